"""Decoupled and async: waits for GO without keeping the next requests from running."""

import asyncio

import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self.waiting = {}

    async def execute(self, requests):
        for request in requests:
            name = pb_utils.get_input_tensor_by_name(request, "NAME").as_numpy()[0]
            sender = request.get_response_sender()
            tensor = pb_utils.Tensor("NAME", request.inputs()[0].as_numpy().copy())
            sender.send(pb_utils.InferenceResponse([tensor]))
            if name.startswith(b"go:"):
                self.waiting[name.removeprefix(b"go:")].set()
            elif name.startswith(b"raise"):
                raise ValueError("too late")
            else:
                self.waiting[name] = asyncio.Event()
                await self.waiting[name].wait()
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
