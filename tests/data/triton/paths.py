"""Fails with the place of a file that is not there: as an error of the request, or by raising."""

import os

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        file = os.path.join(pb_utils.get_model_dir(), "weights.bin")
        if pb_utils.get_input_tensor_by_name(requests[0], "KIND").as_numpy()[0]:
            os.stat(file)
        error = pb_utils.TritonError(f"no file {file}", pb_utils.TritonError.NOT_FOUND)
        return [pb_utils.InferenceResponse(error=error) for _ in requests]
