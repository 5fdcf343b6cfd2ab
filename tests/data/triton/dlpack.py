"""Through torch, and back, without numpy in between; HALF is bfloat16."""

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack, to_dlpack


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            tensor = pb_utils.get_input_tensor_by_name(request, "X")
            assert tensor.is_cpu()
            x = from_dlpack(tensor.to_dlpack())
            y = pb_utils.Tensor.from_dlpack("Y", to_dlpack(x * 2))
            half = pb_utils.Tensor.from_dlpack("HALF", x.to(torch.bfloat16))
            responses.append(pb_utils.InferenceResponse([y, half]))
        return responses
