"""Passes that remove tokens of transformers."""
