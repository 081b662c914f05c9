"""Exact rewrites of linear structure."""
