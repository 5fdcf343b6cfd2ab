"""Fails the requests whose CODE is not -1, each with the code that it names."""

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        responses = []
        for request in requests:
            code = pb_utils.get_input_tensor_by_name(request, "CODE").as_numpy()
            if code[0] == -1:
                responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUT", code)]))
            elif code[0] == 1:
                error = pb_utils.TritonError("An Error Occurred")
                responses.append(pb_utils.InferenceResponse(output_tensors=[], error=error))
            else:
                error = pb_utils.TritonError("An Error Occurred", int(code[0]))
                responses.append(pb_utils.InferenceResponse(error=error))
        return responses
