"""Asks to be run again for the same request until it has counted down; decoupled or not."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.decoupled = pb_utils.using_decoupled_model_transaction_policy(config)
        self.left = {}
        self.rounds = 0

    def execute(self, requests):
        self.rounds += 1
        responses = []
        for request in requests:
            start = int(pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()[0])
            left = self.left.setdefault(request.request_id(), start) - 1
            self.left[request.request_id()] = left
            out = pb_utils.Tensor(
                "OUT", np.array([left if self.decoupled else self.rounds], np.int32)
            )
            response = pb_utils.InferenceResponse([out])
            if left > 0:
                request.set_release_flags(pb_utils.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
                responses.append(None)
            else:
                responses.append(response)
            if self.decoupled:
                final = 0 if left > 0 else pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
                request.get_response_sender().send(response, flags=final)
        return None if self.decoupled else responses
