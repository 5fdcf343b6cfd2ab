"""V2 health and metadata, as a client sees them."""

import pytest

from repository.lifecycle.states import Event
from tests.integration.v2 import Stage


async def test_the_server_says_what_it_is():
    async with Stage().client as client:
        reply = await client.get("/v2")
    assert reply.content == (
        b'{"name":"depot","version":"1.2","extensions":["binary_tensor_data"]}'
    )


async def test_it_is_ready_once_the_start_is_over_and_until_it_drains():
    stage = Stage()
    stage.models.is_ready = False
    async with stage.client as client:
        live, ready = await client.get("/v2/health/live"), await client.get("/v2/health/ready")
        assert (live.status_code, ready.status_code, ready.content) == (200, 400, b"")
        stage.models.is_ready = True
        ready = await client.get("/v2/health/ready")
        assert (ready.status_code, ready.content) == (200, b"")
        stage.models.is_draining = True
        for path in ("/v2/health/live", "/v2/health/ready"):
            gone = await client.get(path)
            assert (gone.status_code, gone.content) == (503, b'{"error":"Server exiting"}')


@pytest.mark.parametrize("path", ["m", "m/versions/1"])
async def test_metadata_is_that_of_the_generation_that_serves(path):
    async with Stage().client as client:
        reply = await client.get(f"/v2/models/{path}")
    assert reply.json() == {
        "name": "m",
        "versions": ["1", "2"],
        "platform": "fake",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, 2]}],
    }


@pytest.mark.parametrize("path", ["org/n", "org%2Fn", "org/n/versions/1", "org/n/ready"])
async def test_a_nested_name_has_an_address(path):
    async with Stage().client as client:
        assert (await client.get(f"/v2/models/{path}")).status_code == 200


async def test_a_model_that_is_called_ready_has_an_address():
    stage = Stage()
    stage.models.add("ready", loaded=True)
    async with stage.client as client:
        for path in ("ready", "ready/ready", "ready/versions/1"):
            assert (await client.get(f"/v2/models/{path}")).status_code == 200, path


async def test_a_model_is_ready_or_says_why_not():
    stage = Stage()
    stage.models.add("new")
    gen = stage.models.begin("new")
    gen.step(Event.ADMIT)
    stage.models.add("idle")
    async with stage.client as client:
        replies = {
            path: await client.get(f"/v2/models/{path}/ready")
            for path in (
                "m",
                "m/versions/2",
                "new",
                "idle",
                "idle/versions/1",
                "m/versions/9",
                "no",
                "%2e%2e",
            )
        }
    assert {path: r.status_code for path, r in replies.items()} == {
        "m": 200,
        "m/versions/2": 200,
        "new": 400,
        "idle": 404,
        "idle/versions/1": 400,
        "m/versions/9": 404,
        "no": 404,
        "%2e%2e": 400,
    }
    assert replies["new"].content == b'{"error":"Model version not ready"}'
    assert replies["m"].content == b""


async def test_metadata_of_what_is_not_there_is_refused_in_tritons_words():
    async with Stage().client as client:
        reply = await client.get("/v2/models/no")
        version = await client.get("/v2/models/m/versions/9")
    assert reply.content == b"""{"error":"Request for unknown model: 'no' is not found"}"""
    assert version.content == (
        b"""{"error":"Request for unknown model: 'm' version 9 is not found"}"""
    )
    assert (reply.status_code, version.status_code) == (404, 404)
