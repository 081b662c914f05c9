"""CPU targets (this machine, aarch64 and armv7 Linux): C emitter, tool chain and runners."""
