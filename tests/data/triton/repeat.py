"""Decoupled: as many answers as IN has elements, each after its DELAY in ms, from a thread for each
request; and then, alone, the final flag."""

import json
import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.model_config = model_config = json.loads(args["model_config"])
        if not pb_utils.using_decoupled_model_transaction_policy(model_config):
            raise pb_utils.TritonModelException(
                f"the model `{args['model_name']}` can only run as a decoupled model"
            )
        self.inflight_thread_count = 0
        self.inflight_thread_count_lck = threading.Lock()

    def execute(self, requests):
        for request in requests:
            in_input = pb_utils.get_input_tensor_by_name(request, "IN").as_numpy()
            delay_input = pb_utils.get_input_tensor_by_name(request, "DELAY").as_numpy()
            thread = threading.Thread(
                target=self.response_thread,
                args=(request.get_response_sender(), in_input.copy(), delay_input.copy()),
            )
            thread.daemon = True
            with self.inflight_thread_count_lck:
                self.inflight_thread_count += 1
            thread.start()
        return None

    def response_thread(self, response_sender, in_input, delay_input):
        for idx in range(in_input.size):
            if response_sender.is_cancelled():
                break
            time.sleep(int(delay_input[idx]) / 1000)
            out_output = pb_utils.Tensor("OUT", np.array([in_input[idx]], np.int32))
            idx_output = pb_utils.Tensor("IDX", np.array([idx], np.uint32))
            response = pb_utils.InferenceResponse(output_tensors=[out_output, idx_output])
            response_sender.send(response)
        response_sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        with self.inflight_thread_count_lck:
            self.inflight_thread_count -= 1

    def finalize(self):
        inflight_threads = True
        while inflight_threads:
            with self.inflight_thread_count_lck:
                inflight_threads = self.inflight_thread_count != 0
            if inflight_threads:
                time.sleep(0.01)
