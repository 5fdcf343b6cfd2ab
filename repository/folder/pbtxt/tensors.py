"""`input` and `output` of a ModelConfig: names, datatypes, shapes, and what differs for the model."""

from __future__ import annotations

from typing import Any

from repository.folder.pbtxt.page import Page


def datatype(tensor: Any) -> str:
    """The KServe V2 name of its `data_type`; "": it has none."""
    number = tensor.data_type
    field = tensor.DESCRIPTOR.fields_by_name["data_type"]
    name = str(field.enum_type.values_by_number[number].name).removeprefix("TYPE_")
    return "BYTES" if name == "STRING" else name if number else ""


def read_tensors(page: Page) -> None:
    for theirs, ours in (("input", "inputs"), ("output", "outputs")):
        if found := getattr(page.message, theirs):
            page.set(ours, [_tensor(page, t, theirs, ours, i) for i, t in enumerate(found)], theirs)
    for key in ("batch_input", "batch_output"):
        if getattr(page.message, key):
            page.fail(
                key,
                f"'{key}' is not supported: the model would not get what it is made for",
                "serve a version of the model that takes whole batches",
            )


def _tensor(page: Page, tensor: Any, theirs: str, ours: str, i: int) -> dict[str, Any]:
    at = f"{theirs}.{i}"
    values: dict[str, Any] = {
        "name": tensor.name,
        "datatype": datatype(tensor),
        "shape": list(tensor.dims),
    }
    if not values["datatype"]:
        page.fail(at, f"'{theirs}' {i} needs a 'data_type'")
    if getattr(tensor, "optional", False):
        values["optional"] = True
    if getattr(tensor, "allow_ragged_batch", False):
        _ragged(page, f"{at}.allow_ragged_batch")
    if tensor.HasField("reshape") and page.values.get("backend") == "ensemble":
        page.warn(
            f"{at}.reshape", "'reshape' of an ensemble is not honoured: its models have theirs"
        )
    elif tensor.HasField("reshape"):
        values["reshape"] = list(tensor.reshape.shape)
    if getattr(tensor, "label_filename", ""):
        values["labels"] = tensor.label_filename
    page.place(f"{ours}.{i}", at)
    for our, their in (
        ("name", "name"),
        ("datatype", "data_type"),
        ("shape", "dims"),
        ("reshape", "reshape"),
        ("labels", "label_filename"),
    ):
        page.place(f"{ours}.{i}.{our}", f"{at}.{their}")
    return values


def _ragged(page: Page, key: str) -> None:
    """A model in Python is told of requests one by one; any other gets one tensor, of rows that it
    cannot tell apart without `batch_input`."""
    if page.values.get("backend") != "triton_python":
        page.fail(
            key,
            "'allow_ragged_batch' is not supported: requests of different sizes are never joined",
            "remove it, if the model also takes its requests one by one",
        )
