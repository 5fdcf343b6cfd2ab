# mypy: ignore-errors
"""A model of Triton's python backend: onnxruntime, a whole batch in one run.

Lies as <model>/1/model.py beside model.onnx, and is run by Triton's own stub, in the peers'
environment, which has nothing of ours.
"""

import os

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        path = os.path.join(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )

    def execute(self, requests):
        arrays = [triton.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        x = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        y = self.session.run(None, {"x": x})[0]
        answers, at = [], 0
        for array in arrays:
            tensor = triton.Tensor("y", y[at : at + len(array)])
            answers.append(triton.InferenceResponse([tensor]))
            at += len(array)
        return answers
