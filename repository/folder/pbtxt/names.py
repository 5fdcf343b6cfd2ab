"""Which of our backends a ModelConfig means: by `platform`, by `backend`, or by the model's files."""

from __future__ import annotations

import os
from collections.abc import Collection

from repository.folder.pbtxt.page import Page
from repository.folder.schema import nearest
from repository.names import shown

ENSEMBLE = "ensemble"
PLATFORMS = {
    "onnxruntime_onnx": "onnx",
    "pytorch_libtorch": "torchscript",
    "torch_aoti": "torch_export",
    ENSEMBLE: ENSEMBLE,
}
# "pytorch" is torch_export where the file is a .pt2, and "python" one of ours where model.py is
# written so (`guess.as_triton_means`).
BACKENDS = {
    "onnxruntime": "onnx",
    "python": "triton_python",
    "pytorch": "torchscript",
    "libtorch": "torchscript",
    ENSEMBLE: ENSEMBLE,
}
# Where nobody says: the first of these that is there, which is Triton's order.
BY_FILE = {
    "model.onnx": "onnx",
    "model.pt": "torchscript",
    "model.pt2": "torch_export",
    "model.py": "triton_python",
}
ENDINGS = {".onnx": "onnx", ".pt": "torchscript", ".pt2": "torch_export", ".py": "triton_python"}


def read_name(page: Page) -> None:
    name = page.message.name
    if name and name not in (page.model, page.model.rpartition("/")[2]):
        page.fail(
            "name",
            f"unexpected directory name '{page.model}' for model '{shown(name)}', directory name "
            "must equal model name",
            "change 'name' or leave it out",
        )


def read_backend(page: Page) -> str:
    """The name of our backend; "": nobody says, and the files do not tell."""
    said = {}
    for key, known in (("platform", PLATFORMS), ("backend", BACKENDS)):
        wish = getattr(page.message, key)
        if wish and wish not in known:
            near = nearest(wish, known)
            hint = "supported: " + ", ".join(dict.fromkeys([*PLATFORMS, *BACKENDS]))
            page.fail(key, f"the {key} '{shown(wish)}' is not supported{near}", hint)
        if wish:
            said[key] = known[wish]
    if said.get("platform") == "torch_export" and said.get("backend") == "torchscript":
        del said["backend"]  # backend pytorch, and what sort of it
    if len(set(said.values())) > 1:
        page.fail("backend", "'platform' and 'backend' contradict each other", "keep one")
    for key, backend in said.items():
        page.set("backend", backend, key)
    if not said:
        _derived(page)
    return _checked(page)


def _derived(page: Page) -> None:
    if page.message.HasField("ensemble_scheduling"):
        page.set("backend", ENSEMBLE, "ensemble_scheduling")
        return
    wish = page.message.default_model_filename
    found = ENDINGS.get(os.path.splitext(wish)[1], "") if wish else by_file(page.files)
    if found:
        page.set("backend", found, "default_model_filename")


def by_file(files: Collection[str]) -> str:
    """ "": none of Triton's, such as a model.py that comes with weights for torch."""
    found = next((backend for file, backend in BY_FILE.items() if file in files), "")
    weights = any(file.endswith(".safetensors") for file in files)
    return "" if found == "triton_python" and weights else found


def _checked(page: Page) -> str:
    backend = str(page.values.get("backend", ""))
    scheduled = page.message.HasField("ensemble_scheduling")
    if scheduled and backend != ENSEMBLE:
        page.fail(
            "ensemble_scheduling",
            f"ensemble scheduling cannot be set for model '{page.model}' whose platform is not "
            f"{ENSEMBLE}",
            f"write platform: '{ENSEMBLE}', or remove it",
        )
    if backend == ENSEMBLE and not scheduled:
        page.fail(
            "platform",
            f"ensemble scheduling must be set for ensemble {page.model} whose platform is "
            f"{ENSEMBLE}",
        )
    return backend
