"""Requests that belong together, as Triton's sequence batcher has them: `line` lets them in, `direct`
and `oldest` say who runs with whom, `wiring` what the model is told of it."""
