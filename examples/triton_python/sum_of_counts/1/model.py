"""Asks the model `count`, and answers with the sum of all that it counts."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "N", "data_type": "TYPE_INT32", "dims": [1]})
        config.add_output({"name": "SUM", "data_type": "TYPE_INT32", "dims": [1]})
        return config

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        asked = pb_utils.InferenceRequest(
            model_name="count", requested_output_names=["NUMBER"], inputs=request.inputs()
        )
        total = np.zeros(1, np.int32)
        for response in asked.exec(decoupled=True):
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
            total += pb_utils.get_output_tensor_by_name(response, "NUMBER").as_numpy()
        return pb_utils.InferenceResponse([pb_utils.Tensor("SUM", total)])
