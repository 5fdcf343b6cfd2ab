"""Adapters of the models that run: what is wanted, held against what each generation's host knows."""
