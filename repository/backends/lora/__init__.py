"""LoRA on torch models: fixed slots per layer, rows of a batch each with an adapter of their own."""
