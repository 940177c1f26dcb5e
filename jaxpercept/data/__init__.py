"""Images and ground truth: files and procedural scenes in, deterministic batches out.

NumPy and Grain only; nothing here knows a model.
"""
