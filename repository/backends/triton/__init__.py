"""Models written for Triton's python backend, as they are: their `model.py` imports
`triton_python_backend_utils`, which is what `utils.make` makes."""
