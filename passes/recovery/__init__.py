"""Passes that win back accuracy."""
