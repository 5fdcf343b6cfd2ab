"""The one map from what went wrong to what is told."""

import logging

import msgspec
import pytest
from litestar.exceptions import (
    InternalServerException,
    MethodNotAllowedException,
    NotFoundException,
    ValidationException,
)

from repository import errors as inside
from server import errors


def leaves(family):
    found = family.__subclasses__()
    return [family, *(leaf for each in found for leaf in leaves(each))]


@pytest.mark.parametrize(
    ("family", "status"),
    [
        (inside.NotFoundError, 404),
        (inside.RejectedError, 400),
        (inside.OutOfBoundsError, 403),
        (inside.DependencyError, 424),
        (inside.ConflictError, 409),
        (inside.CapacityError, 507),
        (inside.UnavailableError, 503),
        (inside.FailedError, 500),
    ],
)
def test_a_family_has_one_number(family, status):
    """Of an error with two families the first that the map names counts."""
    for leaf in leaves(family):
        error = leaf("why")
        if next(f for f in errors.FAMILIES if issubclass(leaf, f)) is not family:
            continue
        assert errors.status_of(error) == status
        assert errors.status_v2(error) == errors.V2_STATUS.get(leaf, status)
        assert errors.text_of(error) == "why" and not errors.is_foreign(error)


def test_every_error_of_the_repository_has_a_family():
    found = {e for family in errors.FAMILIES for e in leaves(family)}
    assert set(leaves(inside.RepositoryError)) - {inside.RepositoryError} == found


def test_codes_are_their_errors_own():
    """A module may have kinds of its own under the code of what they are."""
    ours = {e for e in leaves(inside.RepositoryError) if e.__module__ == inside.__name__}
    # What a model does not support and what the server does not is one thing to a client.
    theirs = set(leaves(errors.ServerError)) - {errors.UnsupportedError}
    codes = [e.code for e in ours | theirs]
    assert len(set(codes)) == len(codes)


def test_a_body_too_large_is_a_bad_request_to_v2_and_413_to_the_rest():
    error = errors.PayloadTooLargeError("large")
    assert (errors.status_of(error), errors.status_v2(error)) == (413, 400)


@pytest.mark.parametrize(
    ("wait_s", "told"),
    [(0.0, "1"), (0.2, "1"), (1.0, "1"), (1.1, "2"), (None, None), (float("inf"), None)],
)
def test_retry_after_is_in_whole_seconds_rounded_up(wait_s, told):
    error = inside.QueueFullError("full", retry_after_s=wait_s)
    assert errors.headers_of(error).get("Retry-After") == told


def test_a_dead_worker_invites_a_retry():
    assert errors.headers_of(inside.WorkerDiedError("died")) == {"Retry-After": "1"}


def test_headers_say_what_would_do():
    assert errors.headers_of(errors.WrongVerbError("POST")) == {"Allow": "POST"}
    assert errors.headers_of(errors.UnauthorizedError("who?"))["WWW-Authenticate"] == "Bearer"


def test_a_foreign_exception_is_logged_with_its_traceback_and_not_told(caplog):
    error = KeyError("/srv/secret")
    errors.note(error, "GET /x")
    assert (errors.status_of(error), errors.code_of(error)) == (500, "internal")
    assert "secret" not in str(errors.body_native(error)) + errors.text_of(error)
    (record,) = caplog.records
    assert record.exc_info[1] is error and record.levelno == logging.ERROR


def test_what_was_meant_is_not_logged_as_a_surprise(caplog):
    errors.note(inside.ModelNotFoundError("m"), "GET /x")
    errors.note(errors.ForbiddenError("no"), "GET /x")
    errors.note(NotFoundException(), "GET /x")
    assert caplog.records == []


def test_the_frameworks_refusals_are_told_and_its_failures_are_not():
    assert (errors.status_of(NotFoundException()), errors.code_of(NotFoundException())) == (
        404,
        "no_such_path",
    )
    wrong = MethodNotAllowedException()
    assert (errors.text_of(wrong), errors.code_of(wrong)) == (
        "Method Not Allowed",
        "method_not_allowed",
    )
    broken = InternalServerException(detail="secret")
    assert errors.text_of(broken) == errors.INTERNAL_TEXT and errors.is_foreign(broken)


def test_a_refused_field_is_named():
    extra = [{"key": "limit", "message": "Expected `int`, got `str`", "source": "query"}]
    error = ValidationException(detail="Validation failed for GET /x", extra=extra)
    assert errors.text_of(error) == "limit: Expected `int`, got `str`"


def test_a_long_text_is_told_in_parts():
    told = errors.text_of(inside.InvalidRequestError("begin " + "x" * 10**6 + " end"))
    assert len(told) < errors.LONGEST_TEXT and told.startswith("begin ") and told.endswith(" end")


def test_what_the_framework_says_in_two_words_is_told_with_a_way_out():
    missing = errors.body_native(NotFoundException())
    assert missing["detail"].startswith("Not Found; ") and "/v1/models" in missing["detail"]
    wrong = MethodNotAllowedException(headers={"allow": "POST, OPTIONS"})
    assert errors.body_native(wrong)["detail"] == "Method Not Allowed; use POST, OPTIONS"


def test_the_v2_body_is_compact():
    assert errors.body_v2('no "x"') == b'{"error":"no \\"x\\""}'


def test_half_a_surrogate_pair_does_not_cost_the_answer():
    assert errors.body_v2("a\ud800b") == b'{"error":"a?b"}'
    assert errors.encode({"\ud800": ["\udfff", 1]}) == b'{"?":["?",1]}'


def test_the_native_body_has_both_spellings():
    assert errors.body_native(inside.ModelNotFoundError("no model 'm'")) == {
        "error": {
            "message": "no model 'm'",
            "type": "not_found_error",
            "param": None,
            "code": "model_not_found",
        },
        "detail": "no model 'm'",
    }


def test_a_refusal_for_want_of_room_brings_its_numbers():
    error = inside.NoRoomError(
        "no room", needed=9, free=3, device="cuda:0", residents={"a:1": 5}, pinned=["a:1"]
    )
    told = errors.body_native(error)["error"]
    assert (errors.status_of(error), told["type"]) == (507, "capacity_error")
    assert {k: told[k] for k in ("needed", "free", "device", "residents", "pinned")} == {
        "needed": 9,
        "free": 3,
        "device": "cuda:0",
        "residents": {"a:1": 5},
        "pinned": ["a:1"],
    }
    assert msgspec.json.encode(told)
