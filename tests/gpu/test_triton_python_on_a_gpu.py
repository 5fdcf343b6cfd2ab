"""Tensors of models for Triton's python backend that lie on a real GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.dlpack import to_dlpack

from repository.messages import InferRequest, InferResponse
from repository.tensors import Tensor as Wire
from tests.fakes.asking import FakeOthers
from tests.triton_python import ask, loaded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU"),
]
MODEL = """
    import torch
    import triton_python_backend_utils as pb_utils

    class TritonPythonModel:
        def execute(self, requests):
            x = torch.from_dlpack(requests[0].inputs()[0]).cuda()
            tensor = pb_utils.Tensor.from_dlpack("y", x * 2)
            assert not tensor.is_cpu() and tensor.__dlpack_device__()[0] == 2
            again = torch.utils.dlpack.from_dlpack(tensor.to_dlpack())
            half = pb_utils.Tensor.from_dlpack("half", torch.utils.dlpack.to_dlpack(again.bfloat16()))
            asked = pb_utils.InferenceRequest(
                model_name="double", requested_output_names=[], inputs=[tensor],
                preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_GPU, 0),
            )
            (answer,) = asked.exec().output_tensors()
            assert not answer.is_cpu()
            return [pb_utils.InferenceResponse([tensor, half, answer])]
"""


def double(request: InferRequest) -> Iterator[InferResponse]:
    (x,) = request.inputs
    yield InferResponse([Wire.of("z", x.array() * 2)])


def test_a_model_works_on_its_gpu_and_answers_from_there(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    with loaded(tmp_path, MODEL, FakeOthers(double=double)) as m:
        found = m.one(ask(x=x))
    assert found["y"].tolist() == (x * 2).tolist() and found["z"].tolist() == (x * 4).tolist()
    half = torch.from_numpy(found["half"]).view(torch.bfloat16)
    assert half.float().tolist() == (x * 2).tolist()


def test_what_is_not_contiguous_on_a_gpu_is_refused_too(tmp_path: Path) -> None:
    text = "class TritonPythonModel:\n    def execute(self, requests): ..."
    with loaded(tmp_path, text) as m:
        pb = m.backend._utils
        with pytest.raises(pb.TritonModelException, match="contiguous"):
            pb.Tensor.from_dlpack("y", to_dlpack(torch.zeros(3, 4, device="cuda").t()))
