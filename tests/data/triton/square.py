"""Decoupled: IN answers of the value IN each; none for 0. A pool of threads sends them, out of order."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(auto_complete_model_config):
        auto_complete_model_config.add_input({"name": "IN", "data_type": "TYPE_INT32", "dims": [1]})
        auto_complete_model_config.add_output(
            {"name": "OUT", "data_type": "TYPE_INT32", "dims": [1]}
        )
        auto_complete_model_config.set_max_batch_size(0)
        auto_complete_model_config.set_model_transaction_policy({"decoupled": True})
        return auto_complete_model_config

    def initialize(self, args):
        self.pool = ThreadPoolExecutor(4)

    def execute(self, requests):
        for request in requests:
            number = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0])
            self.pool.submit(self.answer, request.get_response_sender(), number)

    def answer(self, sender, number):
        tensor = pb_utils.Tensor("OUT", np.array([number], np.int32))
        response = pb_utils.InferenceResponse([tensor])
        for _ in range(number - 1):
            sender.send(response)
        last = response if number else None
        sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def finalize(self):
        self.pool.shutdown()
