"""What `make bench` makes of its figures: nothing here is timed."""

from __future__ import annotations

import itertools
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from bench import chart, clients, dialects, ratios, report
from bench.contenders import (
    BARE,
    BATCHES,
    CONTENDERS,
    DIRECT,
    ECHO,
    LIMITS,
    OURS,
    STARTERS,
    TRITON,
    limit,
    wanted,
)
from bench.figures import Row, table
from bench.ratios import Key, Sample, Spread
from bench.subjects import SUBJECTS

SAID = """Running 1s test @ http://127.0.0.1:1/
  1000 requests in 1.00s, 1.00MB read

found {"requests": 1000, "took_us": 1000500, "p50_us": 812.0, "p99_us": 2048.5, %s}
"""
NONE = '"not_2xx": 0, "connect": 0, "read": 0, "write": 0, "timeout": 0'


def sample(rate: float, p50_ms: float = 1.0, wrong: dict[str, int] | None = None) -> Sample:
    return Sample(rate, p50_ms, 2 * p50_ms, 100.0, wrong=wrong or {})


def a_round(ours: float, echo: float, **more: Any) -> dict[Key, Sample]:
    return {("tiny", OURS, 16): sample(ours, **more), ("tiny", ECHO, 16): sample(echo)}


def cell(ratio: tuple[float, float, float] | None, name: str = OURS) -> dict[str, Any]:
    spread = dict(zip(("median", "low", "high"), ratio, strict=True)) if ratio else None
    rate = {"median": 1234.5, "low": 1.0, "high": 2.0}
    return {"subject": "tiny", "contender": name, "connections": 16, "ratio": spread, "rate": rate}


# the client ---------------------------------------------------------------------------------------


def test_what_wrk_found_is_read_in_seconds() -> None:
    found = clients.read_wrk(SAID % NONE)
    assert (found.requests, found.seconds) == (1000, 1.0005)
    assert (found.p50_s, found.p99_s) == (0.000812, 0.0020485)
    assert found.wrong == {}


def test_answers_that_are_not_200_and_broken_connections_are_told() -> None:
    wrong = NONE.replace('"not_2xx": 0', '"not_2xx": 3').replace('"read": 0', '"read": 1')
    assert clients.read_wrk(SAID % wrong).wrong == {"not_2xx": 3, "read": 1}


def test_a_client_that_ended_without_a_result_says_what_it_said() -> None:
    with pytest.raises(ValueError, match="unable to connect"):
        clients.read_wrk("unable to connect to 127.0.0.1:1 Connection refused\n")


def test_a_question_and_its_answer_are_the_same_numbers_in_every_dialect() -> None:
    x = SUBJECTS["tiny"].question()
    binary = dialects.answer_binary("tiny", x)
    small = {name.lower(): value for name, value in binary.headers.items()}
    assert (dialects.V2_BINARY.read(small, binary.body) == x).all()
    # A question in base64 has the form of its answer, but for the name.
    encoded = dialects.BASE64.ask(x).body.replace(b'"x"', b'"y"')
    assert (dialects.BASE64.read({}, encoded) == x).all()
    text = dialects.V2_JSON.ask(x).body.replace(b"inputs", b"outputs")
    assert (dialects.V2_JSON.read({}, text) == x).all()


@pytest.mark.parametrize("name", sorted(SUBJECTS))
def test_an_answer_has_the_shape_of_the_question(name: str) -> None:
    x = SUBJECTS[name].question()
    y = SUBJECTS[name].expect(np.concatenate([x, x]))
    assert y.shape == (2, SUBJECTS[name].floats) and y.dtype == np.float32


# ratios -------------------------------------------------------------------------------------------


def test_a_ratio_divides_within_a_round_and_its_spread_is_that_of_the_rounds() -> None:
    rounds = [a_round(120, 100), a_round(300, 200), a_round(90, 100)]
    found = ratios.quotient(rounds, ("tiny", OURS, 16), ("tiny", ECHO, 16))
    assert found == Spread(1.2, 0.9, 1.5)


def test_a_round_with_wrong_answers_counts_for_no_ratio_and_is_told() -> None:
    rounds = [a_round(120, 100), a_round(0, 100, wrong={"not_2xx": 9})]
    ours = next(c for c in ratios.cells_of(rounds) if c.contender == OURS)
    assert ours.ratio == Spread(1.2, 1.2, 1.2)
    assert (ours.rate, ours.wrong) == (Spread(120, 120, 120), 1)
    assert "WRONG ANSWERS in 1 rounds" in report.tables([ours], ["tiny"])


def test_nobody_is_divided_by_what_did_not_take_part() -> None:
    assert ratios.quotient([a_round(1, 1)], ("tiny", OURS, 16), ("tiny", TRITON, 16)) is None


def test_every_limit_takes_part_however_few_are_wanted() -> None:
    names = {contender.name for contender in wanted(["nobody"], peers=False)}
    assert set(LIMITS.values()) <= names
    assert OURS not in names
    assert OURS in {contender.name for contender in wanted(["depot"], peers=False)}


def test_each_contender_has_a_way_to_start_and_serves_models_that_exist() -> None:
    for contender in CONTENDERS:
        assert contender.server in STARTERS
        assert set(contender.paths) <= set(SUBJECTS)


# aims ---------------------------------------------------------------------------------------------


def test_only_aims_whose_sides_were_both_measured_are_judged() -> None:
    rows = ratios.aims([a_round(130, 100)])
    assert [(row.value, row.at_least, row.reached) for row in rows] == [(1.3, 1.2, True)]


def test_an_aim_from_below_that_is_missed_is_marked() -> None:
    (row,) = ratios.aims([a_round(110, 100)])
    assert not row.reached
    text = table("aims", [row, Row("less is better", 1.0, "ms", 2.0)])
    first, second = text.splitlines()[2:]
    assert ">= 1.2 x" in first and first.endswith("MISSED")
    assert "<= 2 ms" in second and not second.endswith("MISSED")


def test_latencies_at_one_connection_are_an_aim_from_above() -> None:
    found = {("tiny", OURS, 1): sample(9, p50_ms=1.5), ("tiny", ECHO, 1): sample(9, p50_ms=1.0)}
    (row,) = ratios.aims([found])
    assert (row.value, row.aim, row.reached) == (1.5, 1.4, False)


# regressions --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "worse"),
    [
        ((0.85, 0.80, 0.90), True),  # a tenth less, and beyond the spread of before
        ((0.85, 0.80, 0.96), False),  # as good as before in one round
        ((0.92, 0.91, 0.93), False),  # less than a tenth
        ((1.20, 1.10, 1.30), False),
    ],
)
def test_a_fall_by_a_tenth_beyond_the_spread_is_a_regression(
    now: tuple[float, float, float], worse: bool
) -> None:
    found = ratios.regressions([cell((1.0, 0.95, 1.05))], [cell(now)])
    assert found == ([("tiny, c=16: Model Depot", 1.0, now[0])] if worse else [])


def test_what_others_lose_is_no_regression_of_ours_nor_is_what_is_new() -> None:
    before, now = (1.0, 0.9, 1.1), (0.1, 0.1, 0.1)
    assert ratios.regressions([cell(before, TRITON)], [cell(now, TRITON)]) == []
    assert ratios.regressions([], [cell(now)]) == []
    assert ratios.regressions([cell(None)], [cell(now)]) == []


def test_regressions_are_found_in_what_a_run_has_written() -> None:
    before = ratios.as_json(ratios.cells_of([a_round(120, 100)]))
    now = ratios.as_json(ratios.cells_of([a_round(60, 100)]))
    assert [which for which, _, _ in ratios.regressions(before, now)] == ["tiny, c=16: Model Depot"]


# the picture --------------------------------------------------------------------------------------


def bars(svg: str) -> list[dict[str, str]]:
    root = ElementTree.fromstring(svg)
    rects = root.iter("{http://www.w3.org/2000/svg}rect")
    return [rect.attrib for rect in rects if rect.get("class", "").startswith("bar")]


def test_the_picture_is_xml_whatever_names_and_texts_hold() -> None:
    panels = [("a < b & c", '"one"', [cell((0.5, 0.4, 0.6), "<peer> & 'co'")])]
    assert len(bars(chart.draw('<t & "q">', ["x > y"], panels, ours=OURS, limits=[]))) == 1


def test_the_picture_sorts_by_ratio_and_ours_stands_out() -> None:
    cells = [cell((0.5, 0.4, 0.6), TRITON), cell((1.5, 1.4, 1.6)), cell((1.0, 1.0, 1.0), ECHO)]
    found = bars(report.picture(cells, ["tiny"]))
    assert [bar["class"] for bar in found] == ["bar ours", "bar limit", "bar"]
    widths = [float(bar["width"]) for bar in found]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == pytest.approx(3 * widths[2], rel=0.01)


def test_the_picture_leaves_out_what_has_no_ratio_and_empty_panels() -> None:
    cells = [cell(None), cell((1.0, 1.0, 1.0), ECHO)]
    assert len(bars(report.picture(cells, ["tiny", "large"]))) == 1
    assert BARE not in report.picture(cells, ["tiny", "large"])


def test_the_limit_of_a_batching_model_is_told_beside_each_number_of_connections() -> None:
    assert ratios.limit_of(("slow", OURS, 64)) == ("slow", BATCHES, 64)
    assert ratios.limit_of(("slow", OURS, 1)) == ("slow", DIRECT, 1)


def test_the_limit_of_every_model_takes_part_whatever_the_number_of_connections() -> None:
    for subject, connections in itertools.product(SUBJECTS, (1, 2, 16, 64, 1000)):
        (one,) = (
            contender
            for contender in CONTENDERS
            if contender.name == limit(subject, connections)
            and subject in contender.paths
            and contender.least <= connections <= contender.most
        )
        assert one.name in {contender.name for contender in wanted(["nobody"], peers=False)}
