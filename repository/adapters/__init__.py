"""LoRA adapters: their files, and which are registered. No framework, no I/O."""
