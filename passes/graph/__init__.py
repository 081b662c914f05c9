"""Rewrites that keep the model's function."""
