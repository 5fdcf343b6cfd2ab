"""Parameters of a request become the adapter of each of its rows."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from repository.adapters.book import AdapterBook
from repository.adapters.orders import ROW_ADAPTERS
from repository.adapting.calls import with_adapters
from repository.adapting.counts import Counts
from repository.adapting.fitting import Fitting
from repository.adapting.rows import RowAdapters
from repository.errors import (
    AdapterNotFoundError,
    AdapterRefusedError,
    InvalidRequestError,
    InvalidTensorError,
    ModelNotReadyError,
)
from repository.events import EventBus
from repository.forms import form_of
from repository.merging import merge, place
from repository.messages import InferRequest
from repository.tensors import Tensor
from tests.adapters import source
from tests.fakes.heart import newborn
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


async def rows_of(*names, host=None, whole=False):
    book = AdapterBook("m")
    book.follow({name: source(name) for name in names})
    counts = Counts()
    fitting = Fitting(host or FakeHost(), book, counts, EventBus(), label="m", limit_s=10)
    await fitting.sync()
    return RowAdapters(fitting, whole=whole), book, counts


def ask(rows=2, *, formed=False, **parameters):
    inputs = [Tensor.of("x", np.zeros((rows, 4), np.float32))]
    form = form_of(inputs, (), parameters) if formed else None
    return InferRequest(inputs, (), "", parameters, form)


def names(request):
    tensor = request.inputs[-1]
    assert (tensor.name, tensor.datatype) == (ROW_ADAPTERS, "BYTES")
    return [name.decode() for name in tensor.array()]


async def test_a_request_is_left_alone_where_there_is_no_adapter():
    rows, _, _ = await rows_of()
    request = ask()
    assert rows.name(request) is request
    with pytest.raises(AdapterNotFoundError, match="The adapter a has not been registered"):
        rows.name(ask(adapter="a"))


async def test_one_name_is_for_all_rows_and_a_list_for_each():
    rows, _, counts = await rows_of("a", "b")
    assert names(rows.name(ask())) == ["", ""]
    assert names(rows.name(ask(adapter="a"))) == ["a", "a"]
    assert names(rows.name(ask(adapters=["b", ""]))) == ["b", ""]
    assert names(rows.name(ask(adapters='["a", "b"]'))) == ["a", "b"]
    named = rows.name(ask(adapter="a", temperature=1))
    assert named.parameters == {"temperature": 1}
    assert (counts.of("a").requests, counts.of("b").requests) == (3, 2)


async def test_a_list_of_one_speaks_for_all_of_a_request_without_a_batch_axis():
    rows, _, _ = await rows_of("a", whole=True)
    assert names(rows.name(ask(rows=3, adapters=["a"]))) == ["a", "a", "a"]
    rows, _, _ = await rows_of("a")
    with pytest.raises(InvalidRequestError, match="1 names for 3 rows"):
        rows.name(ask(rows=3, adapters=["a"]))


@pytest.mark.parametrize(
    "wrong",
    [{"adapter": 1}, {"adapters": ["a"]}, {"adapters": [1, 2]}, {"adapters": "[1"},
     {"adapter": "a", "adapters": "a"}, {"adapter": ["a", "a"]}, {"adapters": {"a": 1}}],
)  # fmt: skip
async def test_what_names_no_rows_is_refused(wrong):
    rows, _, _ = await rows_of("a")
    with pytest.raises(InvalidRequestError, match="adapter"):
        rows.name(ask(**wrong))


async def test_requests_for_different_adapters_merge_and_equal_ones_share_a_form():
    rows, _, _ = await rows_of("a", "b")
    headers = {name: ask(formed=True, adapter=name) for name in "ab"}
    one, other = rows.name(headers["a"]), rows.name(headers["b"])
    assert rows.name(headers["a"]).form is one.form
    assert place(one, 8)[1] == place(other, 8)[1] == place(rows.name(ask()), 8)[1]
    whole = merge([one, other])
    assert whole.inputs[0].shape == (4, 4) and names(whole) == ["a", "a", "b", "b"]


async def test_an_adapter_that_is_failed_loading_or_gone_is_told_apart():
    rows, book, _ = await rows_of("a")
    book.follow({"a": source("a"), "broken": source("broken", problem="its header lies")})
    with pytest.raises(AdapterRefusedError, match="its header lies"):
        rows.name(ask(adapter="broken"))
    book.follow({"b": source("b")})
    with pytest.raises(ModelNotReadyError, match="still loading"):
        rows.name(ask(adapter="b"))
    with pytest.raises(AdapterNotFoundError):
        rows.name(ask(adapter="a"))


async def test_a_request_cannot_bring_the_hidden_input_nor_endless_rows():
    rows, _, _ = await rows_of("a")
    gen = newborn(rows=rows)
    hidden = InferRequest([Tensor.of(ROW_ADAPTERS, np.array([b"a"], object))])
    for bearer in (gen, newborn()):
        with pytest.raises(InvalidTensorError, match="server's own"):
            with_adapters(bearer, hidden)
    with pytest.raises(InvalidRequestError, match="too large"):
        rows.name(InferRequest([Tensor("x", "FP32", (1 << 40, 0), b"")]))


async def test_a_model_without_adapters_takes_no_name():
    request = ask(adapter="", other=1)
    assert with_adapters(newborn(), request) is request
    for named in (ask(adapter="a"), ask(adapters=["", "a"])):
        with pytest.raises(AdapterNotFoundError, match="The adapter a has not been registered"):
            with_adapters(newborn(), named)


async def test_rows_that_cost_nothing_to_send_cost_little_to_name():
    """An empty tensor has any number of rows, and a name may be as long as a request."""
    rows, _, _ = await rows_of("a" * 200)
    empty = [Tensor("x", "FP32", (1 << 20, 0), b"")]

    def asking(name):
        parameters = {"adapter": name}
        return InferRequest(empty, (), "", parameters, form_of(empty, (), parameters))

    tracemalloc.start()
    try:
        with pytest.raises(AdapterNotFoundError):
            rows.name(asking("b" * 10_000))
        with pytest.raises(InvalidRequestError, match="send fewer rows"):
            rows.name(asking("a" * 200))
        few = [rows.name(asking("")) for _ in range(8)]
        assert few[-1].inputs[-1].shape == (1 << 20,)
        del few
        assert tracemalloc.get_traced_memory()[0] < 2 << 20, "none of it is remembered"
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()
