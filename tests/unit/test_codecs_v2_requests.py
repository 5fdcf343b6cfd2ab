"""Reading infer requests: what is understood, and the words in which the rest is refused."""

import json
import time

import numpy as np
import pytest
from msgspec.structs import replace

from repository.errors import InvalidRequestError, InvalidTensorError, RepositoryError
from repository.messages import TensorSpec
from server.codecs import v2_binary, v2_json
from server.codecs.v2_paths import Route, model_of, route_of
from server.codecs.v2_plan import MOST_TEXTS, Extras, Place, known_plan_of, plan_of
from server.errors import ServerError
from tests.fakes.bodies import body, tensor


def read(raw, header_length=None):
    """Also through a plan that is remembered, which must make no difference."""
    header, blobs = v2_binary.split(raw, header_length)
    read_anew = v2_binary.assemble(plan_of(header), blobs, "m")
    remembered = v2_binary.assemble(known_plan_of(header), blobs, "m")
    assert replace(remembered, form=None) == read_anew
    assert replace(v2_binary.assemble(known_plan_of(header), blobs, "m"), form=None) == read_anew
    return read_anew


def one(datatype, shape, data):
    return read(*body(tensor("x", shape, datatype, data))).inputs[0]


def refusal(*args, **rest):
    with pytest.raises((RepositoryError, ServerError)) as caught:
        read(*body(*args, **rest))
    return str(caught.value)


def test_binary_tensors_are_views_of_the_body_in_the_order_of_the_inputs():
    raw, length = body(
        tensor("a", [2], "INT8", binary_data_size=2),
        tensor("b", [1], "INT16", [7]),
        tensor("c", [1], "UINT16", binary_data_size=2),
        blobs=b"\x01\x02\x03\x04",
    )
    a, b, c = read(raw, length).inputs
    assert [list(t.array()) for t in (a, b, c)] == [[1, 2], [7], [0x0403]]
    assert np.shares_memory(np.frombuffer(raw, np.uint8), a.array())


@pytest.mark.parametrize(
    "data", [[1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]], [[1, [2, 3]], 4, 5, 6]]
)
def test_json_data_may_be_nested_or_flat(data):
    assert one("INT32", [2, 3], data).array().tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize("data", [[], [[]], [[], []]])
def test_no_elements_are_no_data(data):
    assert one("FP32", [0, 2], data).array().shape == (0, 2)


@pytest.mark.parametrize(
    ("datatype", "value", "expected"),
    [
        ("INT8", 200, -56),
        ("UINT8", 300, 44),
        ("INT32", 2**32 + 5, 5),
        ("UINT64", 2**64 - 1, 2**64 - 1),
        ("INT64", -(2**63), -(2**63)),
    ],
)
def test_integers_wrap_around(datatype, value, expected):
    assert one(datatype, [1], [value]).array()[0] == expected


def test_a_number_too_large_for_its_type_is_infinite():
    assert one("FP32", [2], [1e300, -1e300]).array().tolist() == [np.inf, -np.inf]


def test_nan_and_infinity_are_numbers():
    found = one("FP64", [2, 2], [[np.nan, np.inf], [-np.inf, 1]]).array()
    assert np.array_equal(found, [[np.nan, np.inf], [-np.inf, 1]], equal_nan=True)


def test_bytes_in_json_are_utf8_strings():
    assert one("BYTES", [2, 1], [["é"], [""]]).array().tolist() == [["é".encode()], [b""]]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_floats_do_not_travel_as_json(datatype):
    assert refusal(tensor("x", [1], datatype, [1.0])) == (
        f"receiving {datatype} data via JSON is not supported. "
        "Please use the binary data format for input x"
    )


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("INT32", [1.5]),
        ("INT32", [True]),
        ("INT32", ["1"]),
        ("UINT8", [-1]),
        ("INT64", [2**63]),
        ("UINT64", [2**64]),
        ("FP32", ["1"]),
        ("FP32", [None]),
        ("FP64", [10**400]),
        ("BOOL", [1]),
        ("BYTES", [1]),
        ("BYTES", [{"a": "b"}]),
        ("FP32", [{"a": [1]}]),
        ("FP32", 1.0),
        ("FP32", "[1]"),
        ("FP32", ["[1]"]),
        ("FP32", {}),
    ],
)
def test_data_of_another_kind_is_refused(datatype, data):
    assert "'x'" in refusal(tensor("x", [1], datatype, data))


def test_too_few_and_too_many_elements_are_refused_in_tritons_words():
    assert refusal(tensor("x", [3], "INT32", [1, 2])).startswith(
        "Failed to parse 'data' field: shape does not match true shape"
    )
    assert refusal(tensor("x", [1], "INT32", [1, 2])).startswith(
        "Unable to parse 'data': Shape does not match true shape of 'data' field"
    )


def test_each_input_has_exactly_one_source():
    start = "Input must set only one of the following fields: "
    assert refusal(tensor("x", [1], "INT32")).startswith(start)
    both = tensor("x", [1], "INT32", [1], binary_data_size=4)
    assert refusal(both, blobs=b"abcd").startswith(start)
    shared = tensor("x", [1], "INT32", [1], shared_memory_region="r")
    assert refusal(shared).startswith(start)


def test_a_plan_says_what_lies_in_shared_memory_and_what_goes_there():
    place = {"shared_memory_region": "r", "shared_memory_byte_size": 4}
    region = tensor("x", [1], "INT32", **place, shared_memory_offset=8)
    raw, _ = body(region, outputs=[{"name": "y", "parameters": place}, {"name": "z"}])
    for plan in (plan_of(raw), known_plan_of(raw)):
        assert plan.extras == Extras({0: Place("r", 8, 4)}, {"y": Place("r", 0, 4)}, {})
        assert (plan.pieces[0].size, plan.pieces[0].data) == (4, None)


@pytest.mark.parametrize(
    "place", [{}, {"shared_memory_byte_size": -1}, {"shared_memory_offset": -1}, {"offset": 1}]
)
def test_a_place_in_shared_memory_has_a_size_and_lies_behind_the_beginning(place):
    said = {"shared_memory_region": "r", **place}
    if "shared_memory_offset" in place:
        said["shared_memory_byte_size"] = 4
    assert "shared" in refusal(tensor("x", [1], "INT32", **said))
    x, y = tensor("x", [1], "INT32", [1]), {"name": "y", "parameters": said}
    assert "output 'y'" in refusal(x, outputs=[y])


def test_blobs_must_be_neither_short_nor_long():
    x = tensor("x", [2], "INT16", binary_data_size=4)
    assert refusal(x, blobs=b"abc") == (
        "unexpected size for input 'x', expecting 1 additional bytes for model 'm'"
    )
    assert refusal(x, blobs=b"abcde") == "unexpected additional input data for model 'm'"


@pytest.mark.parametrize(
    ("shape", "size"), [([2], 7), ([3], 8), ([2**62], 8), ([2**31, 2**31, 2], 8), ([], 8)]
)
def test_a_declared_size_must_be_what_the_shape_needs(shape, size):
    x = tensor("x", shape, "FP32", binary_data_size=size)
    with pytest.raises(RepositoryError):
        check_sizes(read(*body(x, blobs=b"x" * 8)))


def check_sizes(request):
    """As a model's signature does with every request."""
    for each in request.inputs:
        each.check_size()


@pytest.mark.parametrize(
    "shape", [[-1], [2**63], [0, 2**62], [1] * 65, [2**200], [0, 2**63], [2**40] * 60]
)
def test_a_shape_that_no_array_can_have_is_refused(shape):
    assert "shape" in refusal(tensor("x", shape, "BYTES", []))


def test_a_size_below_zero_is_refused():
    x, y = (tensor(n, [1], "BYTES", binary_data_size=s) for n, s in (("x", 6), ("y", -1)))
    assert "negative" in refusal(x, y, blobs=b"\1\0\0\0a")


@pytest.mark.parametrize("shape", ["1", [1.0], [True], None, 1, ["1"]])
def test_a_shape_is_a_list_of_whole_numbers(shape):
    assert "shape" in refusal({"name": "x", "shape": shape, "datatype": "INT8", "data": [1]})


def test_a_name_that_is_given_twice_is_found_among_any_number():
    """In time that grows with their number and not with its square: that would be minutes."""
    names = [{"name": f"x{i}", "shape": [0], "datatype": "FP32", "data": []} for i in range(50_000)]
    assert refusal(*names, names[-1]) == "input 'x49999' already exists in request"


def test_texts_are_bounded_in_their_number():
    many = tensor("x", [MOST_TEXTS + 1], "BYTES", binary_data_size=4)
    assert f"at most {MOST_TEXTS}" in refusal(many, blobs=bytes(4))
    assert f"at most {MOST_TEXTS}" in refusal(tensor("x", [MOST_TEXTS + 1], "BYTES", ["a"]))


def test_names_are_given_once():
    x = tensor("x", [1], "INT32", [1])
    assert refusal(x, x) == "input 'x' already exists in request"
    y = {"name": "y"}
    assert refusal(x, outputs=[y, y]) == "output 'y' already exists in request"


def test_an_unknown_datatype_is_refused_with_those_that_are_known():
    assert "FP32, FP64" in refusal(tensor("x", [1], "FLOAT", [1]))


def test_classes_are_asked_for_by_their_number_and_not_together_with_shared_memory():
    x, y = tensor("x", [1], "INT32", [1]), {"name": "y", "parameters": {"classification": 2}}
    plan = plan_of(body(x, outputs=[y])[0])
    assert plan.extras == Extras({}, {}, {"y": 2}) and not plan.wants_binary("y")
    y["parameters"]["classification"] = 0
    assert plan_of(body(x, outputs=[y])[0]).extras is None
    y["parameters"]["classification"] = -1
    assert "number of classes" in refusal(x, outputs=[y])
    y["parameters"] |= {
        "classification": 1, "shared_memory_region": "r", "shared_memory_byte_size": 4
    }  # fmt: skip
    assert "shared memory can not be used with classification" in refusal(x, outputs=[y])


@pytest.mark.parametrize(
    "parameters",
    [
        {"triton_x": 1},
        {"headers": "h"},
        {"timeout": "1"},
        {"timeout": -1},
        {"priority": True},
        {"sequence_id": 1.5},
        {"sequence_start": 1},
        {"binary_data_output": 1},
        {"mine": [1]},
        {"mine": None},
        {"mine": 2**64},
    ],
)
def test_parameters_that_are_reserved_or_misused_are_refused(parameters):
    assert refusal(tensor("x", [1], "INT32", [1]), parameters=parameters)


def test_parameters_reach_the_model_but_for_those_of_form():
    given = {"binary_data_output": True, "timeout": 5, "sequence_id": "s", "a": 1.5, "b": "c"}
    request = read(*body(tensor("x", [1], "INT32", [1]), parameters=given, id="7"))
    assert request.parameters == {"timeout": 5, "sequence_id": "s", "a": 1.5, "b": "c"}
    assert request.id == "7"


@pytest.mark.parametrize(
    "length", [b"-1", b"x", b"", b"99", b"1.5", b"+3", b"9" * 5000, "²".encode()]
)
def test_a_header_length_out_of_range_is_refused(length):
    with pytest.raises(InvalidRequestError, match="Inference-Header-Content-Length"):
        v2_binary.split(b"{}", length)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"inputs":{}}',
        b'{"inputs":[{}]}',
        b'{"inputs":[1]}',
        b'{"inputs":[]} x',
        b"\xff\xfe",
        b'{"inputs":[NaN]}',
        b'{"inputs":[], "id": NaN}',
        b'{"inputs":[], "id": 5}',
        b'{"inputs":[{"name":"\xff","shape":[1],"datatype":"INT8","data":[1]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\xff"]}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"BYTES","data":["\\ud800"]}]}',
        b'{"inputs":[{"name":"\\ud800","shape":[1],"datatype":"FP32","data":[NaN]}]}',
        b'{"id":"\\ud800","inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}]}',
        b'{"inputs":[{"name":"x","shape":[2],"datatype":"BYTES","data":["\\ud800","NaN"]}],"a":NaN}',
        b'{"inputs":[],"a":NaN' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_not_a_request_is_refused(raw):
    with pytest.raises((InvalidRequestError, InvalidTensorError)):
        read(raw)


@pytest.mark.parametrize("depth", [101, 10_000, 1_000_000])
@pytest.mark.parametrize(
    "where",
    [
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":%s}]}',
        b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":[NaN]}],"more":%s}',
        b'{"more":%s,"inputs":[]}',
    ],
)
def test_deep_nesting_is_refused_clearly_and_at_once(where, depth):
    started = time.process_time()
    with pytest.raises(InvalidRequestError, match="nested deeper than 100 levels"):
        read(where % (b"[" * depth + b"1" + b"]" * depth))
    assert time.process_time() - started < 5


def test_nesting_up_to_the_limit_is_read():
    data = b"[" * 97 + b"1" + b"]" * 97
    header = b'{"inputs":[{"name":"x","shape":[1],"datatype":"FP32","data":%s}]}' % data
    assert v2_json.depth_of(header) == 100
    assert read(header).inputs[0].array().tolist() == [1.0]


def test_brackets_inside_strings_are_not_nesting():
    texts = ["[" * 200, '"[[[', "\\", '\\"[[', "]]]"]
    assert one("BYTES", [5], texts).array().tolist() == [t.encode() for t in texts]
    assert v2_json.depth_of(json.dumps({"a": [texts]}).encode()) == 3


@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_the_depth_does_not_depend_on_where_blocks_end(monkeypatch, block):
    monkeypatch.setattr(v2_json, "_BLOCK", block)
    assert v2_json.depth_of(b'{"a":[[1],"[[[[\\"",[[{"b":"}}"}]]]}') == 5


# raw binary requests ------------------------------------------------------------------------------


def raw(specs, data, *, batched=False):
    return v2_binary.raw_request(specs, memoryview(data), "m", batched=batched).inputs[0]


def test_a_raw_request_is_the_data_of_the_only_input():
    fixed = raw([TensorSpec("x", "INT16", (2, 2))], bytes(8))
    assert (fixed.name, fixed.datatype, fixed.shape) == ("x", "INT16", (2, 2))
    assert raw([TensorSpec("x", "INT16", (-1, 2))], bytes(12)).shape == (3, 2)
    assert raw([TensorSpec("x", "INT16", (-1, 2))], bytes(4), batched=True).shape == (1, 2)
    assert raw([TensorSpec("x", "BYTES", (-1,))], b"abc").array().tolist() == [b"abc"]
    assert raw([TensorSpec("x", "BYTES", (-1, 1))], b"a", batched=True).shape == (1, 1)


@pytest.mark.parametrize(
    ("specs", "data"),
    [
        ([], b"1"),
        ([TensorSpec("x", "INT8", (1,)), TensorSpec("y", "INT8", (1,))], b"1"),
        ([TensorSpec("x", "INT16", (2,))], b"123"),
        ([TensorSpec("x", "INT16", (-1, 2))], b"123"),
        ([TensorSpec("x", "INT16", (-1, 0))], b"12"),
        ([TensorSpec("x", "INT16", (-1, -1))], b"1234"),
        ([TensorSpec("x", "BYTES", (2,))], b"1234"),
    ],
)
def test_a_raw_request_that_leaves_doubt_is_refused(specs, data):
    with pytest.raises((InvalidRequestError, InvalidTensorError)):
        raw(specs, data)


# addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v2/models/m/infer", Route("m", None)),
        ("/v2/models/m/versions/3/infer", Route("m", 3)),
        ("/v2/models/org/name/infer", Route("org/name", None)),
        ("/v2/models/org/name/versions/12/infer", Route("org/name", 12)),
        ("/v2/models/a/versions/1/versions/2/infer", Route("a/versions/1", 2)),
        ("/v2/models/m/versions/x/infer", Route("m/versions/x", None)),
        ("/v2/models/../infer", Route("..", None)),
        ("/v2/models/infer", None),
        ("/v2/models//infer", None),
        ("/v2/models/versions/1/infer", Route("versions/1", None)),
        ("/v2/models/m/versions/²/infer", Route("m/versions/²", None)),
        ("/v2/models/m", None),
        ("/v1/models/m/infer", None),
    ],
)
def test_addresses_are_read_from_the_right(path, route):
    assert route_of(path) == route


def test_the_model_itself_has_an_address_too():
    assert model_of("/v2/models/org/m/versions/2") == Route("org/m", 2)
    assert model_of("/v2/models/org/m/ready", "/ready") == Route("org/m", None)
