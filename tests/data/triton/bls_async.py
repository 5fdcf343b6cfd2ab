"""The same request to add_sub four times at once; OUTPUT0 is the sum of their sums."""

import asyncio

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    async def execute(self, requests):
        responses = []
        for request in requests:
            in_0 = pb_utils.get_input_tensor_by_name(request, "INPUT0")
            in_1 = pb_utils.get_input_tensor_by_name(request, "INPUT1")
            inference_request = pb_utils.InferenceRequest(
                model_name="add_sub", requested_output_names=["OUTPUT0"], inputs=[in_0, in_1]
            )
            awaits = [inference_request.async_exec() for _ in range(4)]
            inference_responses = await asyncio.gather(*awaits)
            for infer_response in inference_responses:
                if infer_response.has_error():
                    raise pb_utils.TritonModelException(infer_response.error().message())
            total = sum(
                pb_utils.get_output_tensor_by_name(r, "OUTPUT0").as_numpy()
                for r in inference_responses
            )
            responses.append(pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT0", total)]))
        return responses
