"""What the steps of an ensemble must look like, and what is said of those that do not fit."""

import pytest

from repository.config import Ensemble, EnsembleStep, ModelConfig, TensorConfig
from repository.errors import ConfigError
from repository.messages import TensorSpec
from repository.wiring import Facts, Needs, Wiring, alike, models_of


def step(model, inputs, outputs, version=None):
    return EnsembleStep(model=model, inputs=inputs, outputs=outputs, version=version)


def config(*steps, inputs=None, outputs=None, **rest):
    def parts(tensors):
        return tuple(
            TensorConfig(name=name, datatype=datatype, shape=shape)
            for name, (datatype, shape) in tensors.items()
        )

    return ModelConfig(
        ensemble=Ensemble(steps=steps),
        inputs=None if inputs is None else parts(inputs),
        outputs=None if outputs is None else parts(outputs),
        **rest,
    )


def wired(*steps, **rest):
    return Wiring("e", config(*steps, **rest))


def facts(inputs, outputs, *, optional=(), **rest):
    """name -> (datatype, full shape)"""
    return Facts(
        inputs=tuple(TensorSpec(n, d, s, n in optional) for n, (d, s) in inputs.items()),
        required=[n for n in inputs if n not in optional],
        outputs=tuple(TensorSpec(n, d, s) for n, (d, s) in outputs.items()),
        **rest,
    )


F4 = ("FP32", (-1, 4))
CHAIN = (step("a", {"x": "in"}, {"y": "mid"}), step("b", {"x": "mid"}, {"y": "out"}))


def refused(what, *found):
    with pytest.raises(ConfigError) as caught:
        what().fit(found) if found else what()
    return caught.value.message


def test_steps_are_ordered_by_what_they_wait_for_not_by_how_they_are_written():
    wiring = wired(CHAIN[1], CHAIN[0])
    assert wiring.order == (1, 0)
    assert [sorted(s.after) for s in wiring.steps] == [[1], []]
    assert (wiring.inputs, wiring.outputs) == (("in",), ("out",))


def test_an_ensemble_without_steps_is_refused():
    assert "has no steps" in refused(lambda: wired())


def test_a_tensor_is_made_once():
    twice = step("c", {"x": "in"}, {"y": "mid"})
    told = refused(lambda: wired(*CHAIN, twice))
    assert told == (
        "in ensemble 'e', the tensor 'mid' is made twice, by step 'a' and step 'c'; give one of them "
        "another name"
    )


def test_an_input_of_the_ensemble_is_made_by_no_step():
    assert "which is an input of the ensemble" in refused(
        lambda: wired(*CHAIN, inputs={"in": F4, "mid": F4})
    )


def test_what_a_step_takes_comes_from_somewhere():
    told = refused(lambda: wired(*CHAIN, inputs={"other": F4}))
    assert "step 'a': its input 'x' is the tensor 'in', which no step makes" in told


def test_steps_in_a_circle_are_refused():
    told = refused(
        lambda: wired(step("a", {"x": "q"}, {"y": "p"}), step("b", {"x": "p"}, {"y": "q"}))
    )
    assert "wait for each other in a circle: step 'a', step 'b'" in told


def test_an_ensemble_is_no_step_of_itself():
    assert "is the ensemble itself" in refused(lambda: wired(step("e", {"x": "in"}, {"y": "out"})))


def test_every_output_is_made_by_a_step():
    assert "no step makes its output 'more'" in refused(lambda: wired(*CHAIN, outputs={"more": F4}))


def test_a_model_that_is_there_twice_is_told_apart_by_its_place():
    wiring = wired(step("a", {"x": "in"}, {"y": "mid"}), step("a", {"x": "mid"}, {"y": "out"}))
    assert [s.said for s in wiring.steps] == ["step 1 ('a')", "step 2 ('a')"]


ADD = facts({"x": F4}, {"y": F4})


def test_what_is_not_said_of_the_ensemble_is_taken_from_its_models():
    fitted = wired(*CHAIN).fit([ADD, ADD])
    assert fitted.inputs == (TensorSpec("in", "FP32", (-1, 4)),)
    assert fitted.outputs == (TensorSpec("out", "FP32", (-1, 4)),)


def test_models_that_say_nothing_fit_everywhere():
    fitted = wired(*CHAIN, inputs={"in": ("FP32", (4,))}).fit([Facts(), Facts()])
    assert fitted.inputs == (TensorSpec("in", "FP32", (4,)),)
    assert fitted.outputs == ()


def test_shapes_are_those_with_the_batch_axis_on_both_sides():
    said = wired(*CHAIN, inputs={"in": ("FP32", (4,))}, max_batch_size=2)
    assert said.fit([ADD, ADD]).inputs == (TensorSpec("in", "FP32", (-1, 4)),)
    unsaid = wired(*CHAIN, inputs={"in": ("FP32", (4,))})
    assert "does not fit" in refused(lambda: unsaid, ADD, ADD)


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (
            facts({"x": ("INT64", (-1, 4))}, {"y": F4}),
            "the tensor 'mid' does not fit: output 'y' of step 'a' is FP32 [-1,4], and input 'x' of "
            "step 'b' is INT64 [-1,4]",
        ),
        (
            facts({"x": ("FP32", (-1, 5))}, {"y": F4}),
            "the tensor 'mid' does not fit: output 'y' of step 'a' is FP32 [-1,4], and input 'x' of "
            "step 'b' is FP32 [-1,5]",
        ),
        (facts({"z": F4}, {"y": F4}), "step 'b': its model has no input 'x'; it has 'z'"),
        (facts({"x": F4}, {"z": F4}), "step 'b': its model has no output 'y'; it has 'z'"),
        (
            facts({"x": F4, "mask": F4}, {"y": F4}),
            "step 'b': its model needs the input 'mask', which gets no tensor",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_both_ends(second, told):
    assert refused(lambda: wired(*CHAIN), ADD, second) == f"in ensemble 'e', {told}"


def test_an_input_that_is_optional_may_be_left_out():
    wired(*CHAIN).fit([ADD, facts({"x": F4, "mask": F4}, {"y": F4}, optional=("mask",))])


def test_an_output_of_another_kind_than_the_config_says_is_refused():
    told = refused(lambda: wired(*CHAIN, outputs={"out": ("INT8", (-1, 4))}), ADD, ADD)
    assert "output 'y' of step 'b' is FP32 [-1,4], and output 'out' of the ensemble is INT8" in told


def test_no_step_takes_smaller_batches_than_the_ensemble():
    said = {"inputs": {"in": ("FP32", (4,))}, "max_batch_size": 8}
    small = facts({"x": F4}, {"y": F4}, max_batch_size=4)
    told = refused(lambda: wired(*CHAIN, **said), ADD, small)
    assert "it takes batches of 8, and step 'b' no more than 4" in told


MANY = facts({"x": F4}, {"y": F4}, decoupled=True)


def test_steps_are_told_by_how_many_of_any_number_of_answers_they_come_after():
    third = step("c", {"x": "in"}, {"y": "side"})
    fitted = wired(*CHAIN, third).fit([MANY, MANY, ADD])
    assert (fitted.many, fitted.level) == ((0, 1), (0, 1, 0))


def test_two_steps_of_any_number_of_answers_come_after_each_other():
    beside = step("c", {"x": "in"}, {"y": "side"})
    told = refused(lambda: wired(CHAIN[0], beside), MANY, MANY)
    assert "step 'a' and step 'c' both give any number of answers" in told


def test_only_those_steps_are_needed_that_the_wanted_outputs_come_from():
    wiring = wired(*CHAIN, step("c", {"x": "in"}, {"y": "side"}))
    needs = Needs(wiring)
    assert needs.of(()) == {0, 1, 2}
    assert needs.of(("side",)) == {2}
    assert needs.of(("out",)) == {0, 1}


def test_wildcards_are_like_any_size_of_the_same_rank():
    assert alike((-1, 4), (2, -1)) and not alike((2, 4), (2, 5)) and not alike((4,), (1, 4))


def test_only_an_ensemble_names_models():
    assert models_of(ModelConfig()) == ()
    assert models_of(config(*CHAIN, CHAIN[0])) == ("a", "b")
