"""What `python -m jaxpercept.app` shows: uploads, rounds and pictures, and the page around them.

Only `page` and `server` know Gradio.
"""
