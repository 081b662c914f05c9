"""QEMU as a measuring instrument."""
