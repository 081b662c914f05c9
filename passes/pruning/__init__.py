"""Passes that remove weights and channels."""
