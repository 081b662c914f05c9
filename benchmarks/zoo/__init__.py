"""A zoo of models that nobody wrote for edgec, and what becomes of each of them: see `python -m benchmarks.zoo --help`.

Hand-written models are in the modules named by `registry.HAND`; they need nothing but torch, and tests use them too.
Those of timm and transformers need `make peers`.
"""
