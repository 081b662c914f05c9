"""Back ends: device table, kernel templates, code generation and runners. Nothing here imports torch."""
