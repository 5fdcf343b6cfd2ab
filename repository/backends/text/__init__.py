"""Text generation over unmodified Hugging Face models."""
