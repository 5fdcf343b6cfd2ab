"""Uses another model before it is ready itself: VALUE is what add_sub made of ones."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        if not pb_utils.is_model_ready(model_name="add_sub", model_version="1"):
            pb_utils.load_model(model_name="add_sub")
        ones = np.ones((1, 4), np.int32)
        request = pb_utils.InferenceRequest(
            model_name="add_sub",
            requested_output_names=["OUTPUT0"],
            inputs=[pb_utils.Tensor("INPUT0", ones), pb_utils.Tensor("INPUT1", ones)],
        )
        response = request.exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        self.value = pb_utils.get_output_tensor_by_name(response, "OUTPUT0").as_numpy()[0]

    def execute(self, requests):
        tensor = pb_utils.Tensor("VALUE", self.value)
        return [pb_utils.InferenceResponse([tensor]) for _ in requests]
