"""Texts to vectors, by encoders as sentence-transformers lays them out."""
