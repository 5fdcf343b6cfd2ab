"""Requests through the steps of an ensemble: side by side, in order, left, and gone wrong."""

import asyncio

import pytest

from repository.config import Ensemble, EnsembleStep
from repository.entrance import entrance
from repository.errors import (
    InferenceFailedError,
    InvalidRequestError,
    InvalidTensorError,
    ModelNotReadyError,
    QueueFullError,
    WorkerDiedError,
)
from repository.hosts.ensemble import EnsembleHost
from repository.lifecycle.states import State
from repository.messages import InferRequest, InferResponse, Loaded, TensorSpec
from repository.passing import Passing
from repository.responding import Responses
from repository.signature import Signature
from repository.tensors import Tensor
from tests.fakes.heart import brought, newborn, spec
from tests.fakes.host import FakeHost

pytestmark = pytest.mark.looptime


def tensor(name, text=b""):
    return Tensor(name, "UINT8", (len(text),), text)


def upper(letter):
    """Adds its letter to all inputs, joined."""

    def result(request):
        told = b"".join(bytes(each.data) for each in request.inputs) + letter.encode()
        return InferResponse([tensor("y", told)])

    return result


class Many:
    """A line of a model with any number of answers: the test tells them."""

    def __init__(self):
        self.opened = []

    def open(self, request):
        self.opened.append(Responses(request))
        return self.opened[-1]

    def close(self, cause):
        pass


class Models:
    """A `Caller` over models that were added by hand."""

    def __init__(self):
        self.gens, self.hosts = {}, {}

    def add(self, name, host=None, line=None, loaded=None, **config):
        host = host or FakeHost(result=upper(name), slots=9)
        loaded = loaded or Loaded(abilities=("decoupled",) if isinstance(line, Many) else ())
        gen = brought(newborn(spec(name, **config), len(self.gens) + 1), State.READY)
        gen.loaded, gen.signature = loaded, Signature(name, loaded)
        gen.batcher = line or entrance(gen.spec, host, loaded, max_queue=9)
        self.gens[name], self.hosts[name] = gen, host
        return gen

    def lease(self, model, version=None, parameters=None):
        if model not in self.gens:
            raise ModelNotReadyError(f"'{model}' does not serve")
        return self.gens[model].lease()

    def infer(self, gen, request):
        gen.signature.accept(request)
        return gen.batcher.submit(request)

    def stream(self, gen, request):
        return gen.batcher.open(request)


def step(model, inputs, outputs):
    return EnsembleStep(model=model, inputs=inputs, outputs=outputs)


async def ensemble(models, *steps, name="e", max_inflight=0, **rest):
    what = spec(name, ensemble=Ensemble(steps=steps, max_inflight=max_inflight), **rest)
    host = EnsembleHost(models)
    loaded = await host.load(what, ["cpu"])
    return Passing(host, loaded)


A = step("a", {"x": "in"}, {"y": "p"})
B = step("b", {"x": "p"}, {"y": "out"})
IN = InferRequest([tensor("in", b"-")])


def abc(*names, **knobs):
    models = Models()
    for name in names:
        models.add(name, FakeHost(result=upper(name), slots=9, **knobs))
    return models


def text(response):
    (only,) = response.outputs
    return bytes(only.data).decode()


async def test_tensors_go_from_step_to_step_as_they_are():
    models = abc("b")
    made = InferResponse([tensor("y", memoryview(b"same"))])
    models.add("a", FakeHost(result=lambda request: made))
    line = await ensemble(models, A, B)
    assert text(await line.submit(IN)) == "sameb"
    given = models.hosts["b"].batches[0].inputs[0]
    assert given.data is made.outputs[0].data and given.name == "x"


async def test_branches_run_side_by_side_and_join(looptime):
    models = abc("a", "b", "c", "d", infer_s=3)
    left = step("b", {"x": "p"}, {"y": "l"})
    right = step("c", {"x": "p"}, {"y": "r"})
    join = step("d", {"x1": "l", "x2": "r"}, {"y": "out"})
    line = await ensemble(models, join, left, right, A)
    assert text(await line.submit(IN)) == "-ab-acd"
    assert looptime == 9


async def test_many_requests_go_at_once(looptime):
    line = await ensemble(abc("a", "b", infer_s=2), A, B)
    waiting = [line.submit(IN) for _ in range(5)]
    assert line.in_flight == 5 and line.queue_length == 0
    assert {text(await each) for each in waiting} == {"-ab"}
    assert looptime == 4 and (line.executions, line.in_flight) == (5, 0)


async def test_steps_whose_outputs_nobody_wants_do_not_run():
    models = abc("a", "b", "c")
    line = await ensemble(models, A, B, step("c", {"x": "in"}, {"y": "side"}))
    response = await line.submit(InferRequest([tensor("in")], ("side",)))
    assert [t.name for t in response.outputs] == ["side"]
    assert models.hosts["a"].batches == [] == models.hosts["b"].batches


async def test_a_steps_request_has_the_id_and_the_parameters_of_the_clients():
    models = abc("a", "b")
    line = await ensemble(models, A, B)
    said = {"sequence_id": 7, "sequence_start": True, "priority": 2, "timeout": 10**7}
    await line.submit(InferRequest([tensor("in")], id="42", parameters=said))
    for host in models.hosts.values():
        assert (host.batches[0].id, host.batches[0].parameters) == ("42", said)


async def test_an_optional_input_that_is_not_there_is_left_out():
    models = abc("a")
    line = await ensemble(models, step("a", {"x": "in", "z": "more"}, {"y": "out"}))
    assert text(await line.submit(IN)) == "-a"
    assert [t.name for t in models.hosts["a"].batches[0].inputs] == ["x"]


async def test_names_that_the_ensemble_does_not_have_are_refused():
    line = await ensemble(abc("a", "b"), A, B)
    for request in (
        InferRequest([tensor("out")]),
        InferRequest([tensor("in")], ("p",)),
        InferRequest([]),
    ):
        with pytest.raises(InvalidTensorError):
            line.submit(request)


async def test_an_error_keeps_its_kind_and_names_the_step():
    models = abc("a")

    def refuse(request):
        raise InvalidTensorError("the third row is not sorted")

    models.add("b", FakeHost(result=refuse))
    line = await ensemble(models, A, B)
    with pytest.raises(InvalidTensorError, match="in ensemble 'e', step 'b': the third row"):
        await line.submit(IN)
    assert all(gen.leases == 0 for gen in models.gens.values()) and not line.in_flight


async def test_a_full_queue_of_a_step_is_told_with_when_to_come_again():
    models = abc("a", infer_s=60)
    gen = models.add("b", FakeHost(infer_s=60), batching=None)
    gen.batcher.close(QueueFullError("it is full", retry_after_s=3.0))
    line = await ensemble(models, A, B)
    with pytest.raises(QueueFullError, match="step 'b': it is full") as caught:
        await line.submit(IN)
    assert caught.value.retry_after_s == 3.0


async def test_an_output_that_a_step_does_not_give_is_told():
    models = abc("a")
    models.add("b", FakeHost(result=lambda request: InferResponse([])))
    line = await ensemble(models, A, B)
    with pytest.raises(InferenceFailedError, match=r"step 'b' did not answer with .* output 'out'"):
        await line.submit(IN)


async def test_a_model_that_is_not_there_is_told_at_once():
    models = abc("a", "b")
    line = await ensemble(models, A, B)
    del models.gens["b"]
    with pytest.raises(ModelNotReadyError, match="in ensemble 'e', step 'b': 'b' does not serve"):
        line.submit(IN)
    assert models.gens["a"].leases == 0


async def test_a_step_that_has_changed_so_that_it_does_not_fit_is_never_asked():
    models = abc("a", "b")
    line = await ensemble(models, A, B)
    changed = models.add("a")
    changed.signature.outputs = (TensorSpec("z", "FP32", (4,)),)
    changed.serial = 9
    with pytest.raises(ModelNotReadyError, match="its model has no output 'y'; it has 'z'"):
        line.submit(IN)
    assert not models.hosts["a"].batches and changed.leases == 0


async def test_who_leaves_leaves_the_steps():
    models = abc("a", "b", infer_s=10)
    line = await ensemble(models, A, B)
    answer = line.submit(IN)
    await asyncio.sleep(1)
    answer.cancel()
    await asyncio.sleep(0.1)
    assert not line.in_flight and models.gens["a"].leases == 0 == models.gens["b"].leases
    await asyncio.sleep(60)
    assert models.hosts["b"].batches == []


async def test_models_are_held_until_the_last_step_is_done():
    models = abc("a", "b", infer_s=10)
    line = await ensemble(models, A, B)
    answer = line.submit(IN)
    await asyncio.sleep(15)
    assert models.gens["a"].leases == 1 == models.gens["b"].leases
    await answer
    assert models.gens["a"].leases == 0


async def test_an_ensemble_in_an_ensemble_is_one_of_its_steps():
    models = abc("a", "b", "c")
    inner = await ensemble(models, A, B, name="inner")
    models.add("inner", line=inner)
    outer = await ensemble(
        models, step("c", {"x": "in"}, {"y": "t"}), step("inner", {"in": "t"}, {"out": "end"})
    )
    assert text(await outer.submit(IN)) == "-cab"


async def test_what_an_inner_one_needs_is_held_for_it_from_the_beginning():
    models = abc("a", "b", "c", infer_s=10)
    inner = await ensemble(models, A, B, name="inner")
    models.add("inner", line=inner).host = inner._host
    outer = await ensemble(
        models, step("c", {"x": "in"}, {"y": "t"}), step("inner", {"in": "t"}, {"out": "end"})
    )
    answer = outer.submit(IN)
    await asyncio.sleep(1)
    gone = [models.gens.pop(name) for name in "ab"]
    assert [gen.leases for gen in gone] == [1, 1]
    assert text(await answer) == "-cab"
    assert [gen.leases for gen in gone] == [0, 0]


async def test_stopped_it_fails_what_has_not_ended_in_time():
    models = abc("a", "b", infer_s=100)
    line = await ensemble(models, A, B)
    answer = line.submit(IN)
    line.close(ModelNotReadyError("unloading"))
    with pytest.raises(ModelNotReadyError):
        line.submit(IN)
    await line._host.stop(5)
    with pytest.raises(WorkerDiedError):
        await answer


# any number of answers ------------------------------------------------------------------------------


async def streamed(max_inflight=0, decoupled=True, infer_s=0.0):
    models = abc("b", infer_s=infer_s)
    many = Many()
    models.add("a", line=many)
    line = await ensemble(models, A, B, max_inflight=max_inflight, decoupled=decoupled)
    return models, many, line


async def test_each_answer_of_a_step_goes_on_by_itself_and_they_come_in_order():
    models, many, line = await streamed()
    host = models.hosts["b"]
    answers = line.open(IN)
    await asyncio.sleep(1)
    (given,) = many.opened
    for word, takes_s in ((b"1", 9), (b"2", 1), (b"3", 5)):
        host.infer_s = takes_s
        given.tell(InferResponse([tensor("y", word)]))
        await asyncio.sleep(0.1)
    given.end()
    assert [text(each) async for each in answers] == ["1b", "2b", "3b"]
    assert models.gens["a"].leases == 0


async def test_answers_are_told_while_more_may_come():
    _, many, line = await streamed()
    answers = line.open(IN)
    await asyncio.sleep(1)
    many.opened[0].tell(InferResponse([tensor("y", b"1")]))
    assert text(await anext(answers)) == "1b"
    many.opened[0].tell(InferResponse([tensor("y", b"2")]))
    assert text(await anext(answers)) == "2b"
    many.opened[0].end(InferenceFailedError("no more"))
    with pytest.raises(InferenceFailedError, match="in ensemble 'e', step 'a': no more"):
        await anext(answers)


async def test_no_more_answers_than_allowed_are_on_their_way():
    models, many, line = await streamed(max_inflight=2, infer_s=10)
    answers = line.open(IN)
    await asyncio.sleep(1)
    for n in range(5):
        many.opened[0].tell(InferResponse([tensor("y", str(n).encode())]))
    many.opened[0].end()
    await asyncio.sleep(5)
    assert len(models.hosts["b"].batches) == 2
    assert [text(each) async for each in answers] == ["0b", "1b", "2b", "3b", "4b"]


async def test_no_more_answers_are_made_than_are_read():
    models, many, line = await streamed(max_inflight=2)
    answers = line.open(IN)
    await asyncio.sleep(1)
    for n in range(9):
        many.opened[0].tell(InferResponse([tensor("y", str(n).encode())]))
    many.opened[0].end()
    await asyncio.sleep(60)
    assert len(models.hosts["b"].batches) <= 4
    assert [text(each) async for each in answers] == [f"{n}b" for n in range(9)]


async def test_who_closes_his_answers_leaves_the_step_that_gives_them():
    models, many, line = await streamed()
    answers = line.open(IN)
    left = []
    await asyncio.sleep(1)
    many.opened[0].on_close = left.append
    answers.close()
    await asyncio.sleep(1)
    assert left == many.opened and models.gens["a"].leases == 0 and not line.in_flight


async def test_without_being_decoupled_it_has_one_answer():
    _, many, line = await streamed(decoupled=False)
    answer = line.submit(IN)
    await asyncio.sleep(1)
    many.opened[0].tell(InferResponse([tensor("y", b"1")]))
    many.opened[0].end()
    assert text(await answer) == "1b"


@pytest.mark.parametrize(
    ("answers", "error", "told"),
    [(0, InferenceFailedError, "gave no answer"), (2, InvalidRequestError, "more than one answer")],
)
async def test_one_answer_is_neither_none_nor_two(answers, error, told):
    _, many, line = await streamed(decoupled=False)
    answer = line.submit(IN)
    await asyncio.sleep(1)
    for _ in range(answers):
        many.opened[0].tell(InferResponse([tensor("y", b"1")]))
    many.opened[0].end()
    with pytest.raises(error, match=told):
        await answer
