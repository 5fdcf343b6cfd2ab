"""Handwritten digits by a small network. Its weights are in model.safetensors, beside this file."""

import torch


class Model(torch.nn.Module):
    def __init__(self, width=48):  # `options.init` of config.yaml
        super().__init__()
        self.hidden = torch.nn.Linear(64, width)
        self.digits = torch.nn.Linear(width, 10)

    def forward(self, image):
        """image: float32 [batch, 64], pixels 0..16. The keys are the names of the outputs."""
        scores = self.scores(image)
        return {"label": scores.argmax(1), "probabilities": scores.softmax(1)}

    def scores(self, image):
        return self.digits(torch.relu(self.hidden(image / 16)))
