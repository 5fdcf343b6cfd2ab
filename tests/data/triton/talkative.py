"""Logs, counts, and answers with what it was told: its arguments and the request's parameters."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        logger = pb_utils.Logger
        logger.log_info("Info Msg!")
        logger.log_warn("Warning Msg!")
        logger.log_error("Error Msg!")
        logger.log_verbose("Verbose Msg!")
        logger.log("Specific Msg!", logger.ERROR)
        self.args = args
        self.parameters = json.loads(args["model_config"])["parameters"]
        family = pb_utils.MetricFamily(
            name="requests_seen", description="So many", kind=pb_utils.MetricFamily.COUNTER
        )
        self.metric = family.Metric(labels={"model": args["model_name"], "version": "1"})

    def execute(self, requests):
        responses = []
        for request in requests:
            self.metric.increment(1)
            said = {
                "args": {k: v for k, v in self.args.items() if k != "model_config"},
                "config": self.parameters,
                "request": json.loads(request.parameters()),
                "id": request.request_id(),
                "timeout": request.timeout(),
                "seen": self.metric.value(),
                "dir": pb_utils.get_model_dir(),
            }
            tensor = pb_utils.Tensor("SAID", np.array([json.dumps(said)], dtype=object))
            response = pb_utils.InferenceResponse([tensor], parameters={"kind": "said", "n": 1})
            responses.append(response)
        return responses
