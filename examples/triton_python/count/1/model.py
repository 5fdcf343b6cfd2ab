"""Answers a request for N with the numbers below N, one answer each, from a thread of its own."""

import threading

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    @staticmethod
    def auto_complete_config(config):
        config.add_input({"name": "N", "data_type": "TYPE_INT32", "dims": [1]})
        config.add_output({"name": "NUMBER", "data_type": "TYPE_INT32", "dims": [1]})
        return config

    def execute(self, requests):
        for request in requests:
            most = int(pb_utils.get_input_tensor_by_name(request, "N").as_numpy()[0])
            sender = request.get_response_sender()
            threading.Thread(target=self.count, args=(most, sender)).start()

    def count(self, most, sender):
        for number in range(most):
            if sender.is_cancelled():
                break
            tensor = pb_utils.Tensor("NUMBER", np.array([number], np.int32))
            sender.send(pb_utils.InferenceResponse([tensor]))
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
