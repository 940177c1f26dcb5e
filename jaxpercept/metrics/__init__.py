"""Evaluation protocols: masked metrics per image."""
