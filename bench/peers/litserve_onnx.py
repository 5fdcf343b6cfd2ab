# mypy: ignore-errors
"""LitServe with one API a model: onnxruntime in LitServe's worker processes.

python litserve_onnx.py PORT REPO NAME:BATCH...     each served as /NAME
"""

import base64
import os
import sys

import litserve
import numpy as np
import onnxruntime


class Onnx(litserve.LitAPI):
    def __init__(self, path, **options):
        super().__init__(**options)
        self.path = path

    def setup(self, device):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            self.path, options, providers=["CPUExecutionProvider"]
        )

    def decode_request(self, request):
        return np.frombuffer(base64.b64decode(request["x"]), np.float32).reshape(1, -1)

    def batch(self, inputs):
        return np.concatenate(inputs)

    def predict(self, x):
        return self.session.run(None, {"x": x})[0]

    def unbatch(self, output):
        return [output[row : row + 1] for row in range(len(output))]

    def encode_response(self, output):
        return {"y": base64.b64encode(output.tobytes()).decode()}


def main():
    port, repo, *models = sys.argv[1:]
    apis = []
    for name, batch in (model.split(":") for model in models):
        path = os.path.join(repo, name, "1", "model.onnx")
        apis.append(Onnx(path, api_path=f"/{name}", max_batch_size=int(batch)))
    server = litserve.LitServer(apis, accelerator="cpu", fast_queue=True)
    server.run(
        host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False,
        access_log=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
