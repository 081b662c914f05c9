"""Other number formats than float32, without scales."""
