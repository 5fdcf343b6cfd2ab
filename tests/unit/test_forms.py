"""A form is a shortcut: whatever is concluded from it is what the tensors themselves would say."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from repository.config import ModelConfig
from repository.errors import InferenceFailedError, InvalidTensorError
from repository.forms import MOST_RESIZED, form_of
from repository.merging import JOIN_BELOW, merge, place, split
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.signature import Signature
from repository.tensors import Tensor
from server.codecs.v2_binary import MOST_READY, assemble, encode
from server.codecs.v2_plan import LONGEST_REMEMBERED, Plan, known_plan_of
from tests.fakes.bodies import body, tensor

DTYPES = st.sampled_from([np.int8, np.float32, np.int64])
TAILS = st.lists(st.integers(0, 3), max_size=2).map(tuple)


def rows_of(count, tail=(2,), dtype=np.float32, name="x"):
    made = np.arange(count * int(np.prod(tail, dtype=int))).astype(dtype)
    return Tensor.of(name, made.reshape((count, *tail)))


def request_of(*tensors, **rest):
    asked = InferRequest(list(tensors), **rest)
    return replace(asked, form=form_of(asked.inputs, asked.outputs, asked.parameters))


def whole_of(*tensors, **rest):
    answer = InferResponse(list(tensors), **rest)
    return replace(answer, form=form_of(answer.outputs, (), answer.parameters))


def plain(message):
    return replace(message, form=None)


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=5),
    st.lists(st.tuples(TAILS, DTYPES), min_size=1, max_size=3),
)
@settings(deadline=None)
def test_requests_with_forms_are_merged_and_cut_as_those_without(counts, parts):
    asked = [
        request_of(*[rows_of(n, tail, dtype, f"x{i}") for i, (tail, dtype) in enumerate(parts)])
        for n in counts
    ]
    assert [place(r, 99) for r in asked] == [place(plain(r), 99) for r in asked]
    merged, bare = merge(asked), merge([plain(r) for r in asked])
    assert plain(merged) == bare
    assert [(b.name, b.datatype, b.shape, b.size) for b in merged.form.blanks] == [
        (t.name, t.datatype, t.shape, len(t.data)) for t in merged.inputs
    ]
    cut = split(whole_of(*merged.inputs, compute_s=1.0), counts)
    assert [plain(c) for c in cut] == split(InferResponse(merged.inputs, compute_s=1.0), counts)
    assert [[bytes(t.data) for t in c.outputs] for c in cut] == [
        [bytes(t.data) for t in r.inputs] for r in asked
    ]


def test_a_form_that_does_not_fit_its_bytes_cuts_nothing():
    lying = replace(whole_of(rows_of(2)), outputs=[Tensor("x", "FP32", (2, 2), b"123456789012")])
    with pytest.raises(InferenceFailedError, match="has 12 bytes"):
        split(lying, [1, 1])


def test_texts_are_cut_by_walking_them_though_their_form_is_known():
    words = Tensor.of("w", np.array([b"a", b"bcd"], dtype=object))
    cut = split(whole_of(words), [1, 1])
    assert [c.outputs[0].array().tolist() for c in cut] == [[b"a"], [b"bcd"]]
    assert cut[0].form is None


def test_a_large_merged_tensor_is_handed_on_in_pieces():
    one = rows_of(1, (JOIN_BELOW // 4,))
    data = merge([request_of(one), request_of(one)]).inputs[0].data
    assert data == [one.data, one.data]


def test_the_same_number_of_rows_is_the_same_form_and_not_endlessly_many_are_kept():
    form = form_of([rows_of(2)])
    assert form.resized(2) is form
    assert form.resized(5) is form.resized(5)
    assert form.resized(5).resized(2) is form
    for rows in range(1, 3 * MOST_RESIZED):
        assert form.resized(rows).blanks[0].size == 8 * rows
    assert len(form._resized) <= MOST_RESIZED + 1


def test_tensors_without_a_common_first_axis_have_no_rows():
    assert form_of([rows_of(1), rows_of(2, name="z")]).rows is None
    assert form_of([Tensor("x", "INT8", (), b"1")]).group is None
    assert form_of([]).rows is None


def test_tensors_in_pieces_have_the_form_of_the_whole():
    whole = rows_of(4)
    pieces = Tensor(whole.name, whole.datatype, whole.shape, [whole.data[:5], whole.data[5:]])
    assert form_of([pieces]).blanks == form_of([whole]).blanks


def test_a_form_that_a_model_took_is_taken_again_and_one_that_it_refused_is_refused_again():
    loaded = Loaded(inputs=(TensorSpec("x", "FP32", (-1, 2)),), max_batch_size=2)
    signature = Signature("m", loaded, ModelConfig())
    good, bad = request_of(rows_of(2)), request_of(rows_of(3))
    for _ in range(2):
        signature.accept(good)
        with pytest.raises(InvalidTensorError, match="batch-size must be <= 2"):
            signature.accept(bad)


# requests -----------------------------------------------------------------------------------------


def test_one_plan_serves_every_request_with_that_header():
    header = body(tensor("x", [1], "UINT8", binary_data_size=1), parameters={"k": 1})[0]
    plan = known_plan_of(header)
    first = assemble(plan, memoryview(b"\x01"), "m")
    second = assemble(known_plan_of(bytes(bytearray(header))), memoryview(b"\x02"), "m")
    assert (first.inputs[0].array()[0], second.inputs[0].array()[0]) == (1, 2)
    assert second.parameters == {"k": 1}
    assert first.form is second.form is plan.form


def test_a_header_that_is_refused_is_refused_again():
    header = body(tensor("x", [2], "UINT8", binary_data_size=-1))[0]
    texts = []
    for _ in range(2):
        with pytest.raises(InvalidTensorError) as refused:
            known_plan_of(header)
        texts.append(str(refused.value))
    assert texts[0] == texts[1]


def test_data_in_a_remembered_header_cannot_be_written_to():
    header = body(
        tensor("x", [2], "INT32", data=[1, 2]), tensor("y", [1], "UINT8", binary_data_size=1)
    )
    request = assemble(known_plan_of(header[0]), memoryview(b"\x01"), "m")
    array = request.inputs[0].array()
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 9
    assert bytes(known_plan_of(header[0]).pieces[0].data) == array.tobytes()


def test_a_long_header_is_not_remembered():
    header = body(tensor("x" * LONGEST_REMEMBERED, [1], "UINT8", binary_data_size=1))[0]
    assert known_plan_of(header).form is None


# answers ------------------------------------------------------------------------------------------

BINARY = {"binary_data": True}
HEADER = body(
    tensor("x", [1], "UINT8", binary_data_size=1),
    outputs=[{"name": "b", "parameters": BINARY}, {"name": "a", "parameters": BINARY}],
    id="7",
)[0]


def written(plan, answer, model="m", version=1):
    done = encode(plan, answer, model, version)
    return done.header_length, b"".join(done.buffers), done.total


def test_an_answer_is_written_the_same_from_what_is_remembered():
    plan = known_plan_of(HEADER)
    a, b = rows_of(1, name="a"), rows_of(1, (3,), np.int8, name="b")
    first = whole_of(a, b)
    other = replace(first, outputs=[Tensor("a", "FP32", (1, 2), b"12345678"), b])
    for answer in (first, other, first):
        assert written(plan, answer) == written(plan, plain(answer))
    assert written(plan, first, "n", 2) == written(plan, plain(first), "n", 2)
    assert written(plan, whole_of(b, a)) == written(plan, plain(whole_of(b, a)))


def test_values_that_are_written_as_json_are_never_remembered():
    plan = known_plan_of(body(tensor("x", [1], "UINT8", binary_data_size=1))[0])
    assert plan.form is not None
    first = whole_of(rows_of(1))
    second = replace(first, outputs=[Tensor.of("x", np.array([[5, 6]], np.float32))])
    told = [
        json.loads(written(plan, answer)[1])["outputs"][0]["data"] for answer in (first, second)
    ]
    assert told == [[0.0, 1.0], [5.0, 6.0]]


def test_answers_of_many_forms_do_not_pile_up():
    plan = known_plan_of(body(tensor("x", [1], "UINT8", binary_data_size=1), id="many")[0])
    plan = Plan(*plan[:3], True, *plan[4:])
    for rows in range(5 * MOST_READY):
        answer = whole_of(rows_of(rows))
        assert written(plan, answer) == written(plan, plain(answer))
    assert len(plan.form.reply) <= MOST_READY


def test_an_output_that_is_missing_is_named_though_the_form_is_known():
    with pytest.raises(InferenceFailedError, match="requested output 'b'"):
        written(known_plan_of(HEADER), whole_of(rows_of(1, name="a")))
