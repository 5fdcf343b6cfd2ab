"""What models count themselves: what they may say, how it travels, and what the page shows of it."""

from __future__ import annotations

import asyncio
import gc
import logging
import shutil
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from repository import figures
from repository.backends.triton import metrics
from repository.backends.triton.errors import TritonModelException
from repository.backends.triton.metrics import Book, MetricFamily
from repository.figures import Figures, Series
from server.metrics.own import Own, Told

COUNTER, GAUGE, HISTOGRAM = MetricFamily.COUNTER, MetricFamily.GAUGE, MetricFamily.HISTOGRAM


def family(book: Book, name: str = "things_total", kind: Any = COUNTER) -> MetricFamily:
    return type("MetricFamily", (MetricFamily,), {"book": book})(name, "Things.", kind)


def told(*of: Figures, model: str = "m") -> Told:
    return Told(model, figures.encode(of))


def counter(name: str, value: float, **labels: str) -> Figures:
    return Figures(name, "counter", "Things.", (Series(tuple(sorted(labels.items())), value),))


def gauge(name: str, value: float, changed: float) -> Figures:
    return Figures(name, "gauge", "A gauge.", (Series((), value, changed),))


def histogram(*counts: int, bounds: Iterable[float] = (0.1, 1.0), **labels: str) -> Figures:
    pairs = tuple(sorted(labels.items()))
    series = Series(pairs, float(sum(counts)), 0.0, tuple(bounds), counts)
    return Figures("took_seconds", "histogram", 'Say "how"\nlong \\.', (series,))


def page(*of: Told, openmetrics: bool = False, own: Own | None = None) -> str:
    return (own or Own()).write(of, openmetrics=openmetrics).decode()


# what a model may say -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "no name"), ("1st", "no name"), ("a-b", "no name"), ("a b", "no name"),
        ("ä", "no name"), ("a\n", "no name"), ("x" * 201, "no name"),
        ("modeldepot_requests_total", "server's own"), ("nv_mine", "server's own"),
        ("process_mine", "server's own"),
    ],
)  # fmt: skip
def test_a_name_that_cannot_be_shown_is_refused_in_words(name: str, words: str) -> None:
    with pytest.raises(TritonModelException, match=words):
        family(Book(), name)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"a-b": "c"}, "no name for a label"), ({"__a": "c"}, "no name for a label"),
        ({"": "c"}, "no name for a label"), ({"a": "x" * 257}, "longer than 256"),
        ({"a": "\ud800"}, "no text"), ({f"l{n}": "" for n in range(11)}, "11 labels"),
    ],
)  # fmt: skip
def test_labels_that_cannot_be_shown_are_refused_in_words(
    labels: dict[str, str], words: str
) -> None:
    with pytest.raises(TritonModelException, match=words):
        family(Book()).Metric(labels=labels)


def test_buckets_must_be_few_and_ascend_and_le_is_their_own() -> None:
    of = family(Book(), "h", HISTOGRAM)
    for buckets in ([float("inf")], [2, 1], [1, 1], [float("nan")], list(range(65))):
        with pytest.raises(TritonModelException, match="buckets"):
            of.Metric(buckets=buckets)
    with pytest.raises(TritonModelException, match="'le'"):
        of.Metric(labels={"le": "1"}, buckets=[1])
    kept = of.Metric(buckets=[1])
    with pytest.raises(TritonModelException, match="other buckets"):
        of.Metric(buckets=[2])
    del kept


def test_a_model_has_so_many_families_and_metrics_and_no_more() -> None:
    book = Book()
    families = [family(book, f"f{n}") for n in range(figures.MOST_FAMILIES)]
    with pytest.raises(TritonModelException, match="at most 64 metric families"):
        family(book, "another")
    kept = [families[0].Metric(labels={"n": str(n)}) for n in range(figures.MOST_SERIES)]
    with pytest.raises(TritonModelException, match="at most 1000 metrics"):
        families[1].Metric()
    kept.pop()
    gc.collect()
    kept.append(families[1].Metric())


def test_two_families_of_one_name_are_one_and_of_another_kind_there_is_none() -> None:
    book = Book()
    first, second = family(book), family(book)
    mine, same = first.Metric(), second.Metric()
    mine.increment(2)
    assert same.value() == 2
    with pytest.raises(TritonModelException, match="already, which is a counter"):
        family(book, kind=GAUGE)
    with pytest.raises(TritonModelException, match="kind is COUNTER"):
        family(book, "x", 7)


@pytest.mark.parametrize("step", [-1, float("nan"), float("inf")])
def test_a_counter_takes_no_step_that_it_could_not_show(step: float) -> None:
    with pytest.raises(TritonModelException, match="only grows"):
        family(Book()).Metric().increment(step)


# how it travels -----------------------------------------------------------------------------------


def test_what_changes_is_told_and_what_is_dropped_is_told_no_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "EVERY_S", 0.01)
    heard: SimpleQueue[Any] = SimpleQueue()
    book = Book(heard.put)

    def until(values: dict[str, float]) -> None:
        while True:
            (of,) = heard.get(timeout=10)
            if {s.labels[0][1]: s.value for s in of.series} == values:
                return

    try:
        of = family(book)
        one, two = of.Metric({"n": "1"}), of.Metric({"n": "2"})
        until({"1": 0, "2": 0})
        one.increment(3)
        until({"1": 3, "2": 0})
        del two
        gc.collect()
        until({"1": 3})
    finally:
        book.close()
    one.increment(1)
    assert heard.empty() and book._thread is None


def test_a_model_that_nobody_hears_counts_without_a_thread() -> None:
    book = Book()
    family(book).Metric().increment(1)
    assert book._thread is None
    book.close()


def test_of_what_a_worker_tells_only_what_a_page_can_show_is_read() -> None:
    series = (
        Series((("b", ""), ("a", "")), 1.0),  # not in order
        Series((("a-b", ""),), 1.0),
        Series((), 2.0),
    )
    wrong = histogram(1, 2)
    given = [
        Figures("nv_x", "counter", ""), Figures("good", "counter", "", series), wrong,
        Figures("h", "histogram", "", (Series((), 1.0, 0.0, (2.0, 1.0), (1, 1, 1)),)),
    ]  # fmt: skip
    found = figures.read(figures.encode(given))
    assert [(of.name, len(of.series)) for of in found] == [
        ("good", 1),
        ("took_seconds", 0),
        ("h", 0),
    ]
    assert figures.read(b"nonsense") == [] and figures.read(figures.encode([1])) == []


# the page -----------------------------------------------------------------------------------------

SOME = told(
    counter("things_total", 3, model="m", version="1"),
    counter("calls", 1.5),
    gauge("level", -2, 1.0),
    histogram(1, 0, 2, a='q"u\\o\nte', z="é"),
)


def test_the_older_format_shows_names_as_the_model_gave_them() -> None:
    assert page(SOME).splitlines() == [
        "# HELP things_total Things.",
        "# TYPE things_total counter",
        'things_total{model="m",version="1"} 3.0',
        "# HELP calls Things.",
        "# TYPE calls counter",
        "calls 1.5",
        "# HELP level A gauge.",
        "# TYPE level gauge",
        "level -2.0",
        '# HELP took_seconds Say "how"\\nlong \\\\.',
        "# TYPE took_seconds histogram",
        'took_seconds_bucket{a="q\\"u\\\\o\\nte",le="0.1",z="é"} 1.0',
        'took_seconds_bucket{a="q\\"u\\\\o\\nte",le="1.0",z="é"} 1.0',
        'took_seconds_bucket{a="q\\"u\\\\o\\nte",le="+Inf",z="é"} 3.0',
        'took_seconds_count{a="q\\"u\\\\o\\nte",z="é"} 3.0',
        'took_seconds_sum{a="q\\"u\\\\o\\nte",z="é"} 3.0',
    ]


def test_both_formats_say_the_same_to_their_readers() -> None:
    older = {s.name: s.value for of in parse(page(SOME)) for s in of.samples}
    older["calls"] = older.pop("calls_total")  # prometheus_client renames what it reads
    rich = list(parse_openmetrics(page(SOME, openmetrics=True) + "# EOF\n"))
    assert {s.name: s.value for of in rich for s in of.samples} == older
    kinds = {of.name: of.type for of in rich}
    assert kinds == {
        "things": "counter", "calls": "unknown", "level": "gauge", "took_seconds": "histogram",
    }  # fmt: skip


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
async def test_promtool_finds_nothing_to_say() -> None:
    tool = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics", stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    text = page(told(counter("things_total", 3, a="b"), gauge("level", 1, 1.0), histogram(1, 0, 2)))
    said, _ = await tool.communicate(text.encode())
    assert (said, tool.returncode) == (b"", 0)


def test_of_several_instances_counts_are_summed_and_of_a_gauge_the_last_is_shown() -> None:
    both = page(
        told(counter("n", 1), gauge("g", 5, 20.0), histogram(1, 0, 2)),
        told(counter("n", 2), gauge("g", 7, 10.0), histogram(0, 4, 0)),
        told(counter("n", 4, a="b"), model="other"),
    )
    for line in ("n 3.0", 'n{a="b"} 4.0', "g 5.0", 'took_seconds_bucket{le="1.0"} 5.0',
                 "took_seconds_count 7.0", "took_seconds_sum 7.0"):  # fmt: skip
        assert line in both.splitlines()


def test_who_comes_second_with_a_name_that_is_something_else_is_left_out_and_told_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = Own()
    first = told(counter("x_total", 1), histogram(1, 0, 2))
    second = told(
        gauge("x_total", 1, 1.0), gauge("x", 1, 1.0), counter("took_seconds_count", 9),
        histogram(9, bounds=()), histogram(1, 1, bounds=(7.0,)), counter("fine", 1), model="late",
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        text = page(first, second, own=own)
        page(first, second, told(), own=own)
    assert "fine 1.0" in text and "took_seconds_count 3.0" in text and "9.0" not in text
    assert sorted(r.getMessage() for r in caplog.records) == [
        "the metric 'took_seconds' of model 'late' is not shown: it is there already with other "
        "buckets",
        "the metric 'took_seconds_count' of model 'late' is not shown: a metric of that name is there "
        "already",
        "the metric 'x' of model 'late' is not shown: a metric of that name is there already",
        "the metric 'x_total' of model 'late' is not shown: it is there already as a counter",
    ]


def test_what_has_not_changed_is_not_written_again_and_what_is_gone_is_gone() -> None:
    own = Own()
    before = own.write([SOME], openmetrics=False)
    assert own.write([SOME], openmetrics=False) is before
    assert own.write([], openmetrics=False) == b""
