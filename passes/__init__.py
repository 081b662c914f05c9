"""The compression and transformation schemes: one scheme, one file. Nothing here imports TVM."""
