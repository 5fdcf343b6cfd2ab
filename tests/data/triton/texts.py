"""Turns texts around, and back from bytes as users do it."""

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            texts = pb_utils.get_input_tensor_by_name(request, "TEXT").as_numpy()
            turned = [t.decode("utf-8")[::-1] for t in texts.reshape(-1)]
            as_bytes = np.array([t.encode("utf-8") for t in turned], dtype=np.object_)
            as_text = np.array(turned, dtype=object)
            responses.append(
                pb_utils.InferenceResponse(
                    [
                        pb_utils.Tensor("BYTES", as_bytes.reshape(texts.shape)),
                        pb_utils.Tensor("STR", as_text),
                        pb_utils.Tensor("FIXED", np.array([b"ab", b"c"])),
                    ]
                )
            )
        return responses
