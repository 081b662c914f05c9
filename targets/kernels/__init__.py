"""Kernel templates: one file per kind, each with its NumPy meaning, its packing and its TIR."""
