"""Board "Inference": how much is asked, how it is answered, and where the time goes."""

from __future__ import annotations

from grafana.panels import Board, Mark, Panel, Query, Row
from grafana.promql import RANGE, grown, mean, model, quantile, rate, server, total

DURATION = model("inference_duration_seconds")
FIRST = model("first_token_seconds")
NO_TEXT = "no text model has been asked"
OURS = 'outcome=~"backend_error|timeout"'
QUANTILES = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))


def _outcomes(*more: str) -> str:
    return model("inference_requests_total", *more)


def _share(*failed: str) -> str:
    """Of all that ended; 0 where nothing failed."""
    bad = rate(_outcomes(*failed))
    return f"({bad} or vector(0)) / ({rate(_outcomes())} > 0)"


def _in_phase(phase: str) -> str:
    """Seconds of one request, in the mean."""
    spent = rate(model("inference_phase_seconds_total", phase=phase))
    return f"{spent} / ({rate(model('inference_duration_seconds_count'))} > 0)"


NOW = Row(
    "Now",
    (
        Panel(
            "Requests", "stat", "A second, of the chosen models, however they ended.",
            (Query(rate(_outcomes()), "requests"),),
            unit="reqps", width=4, height=4,
        ),
        Panel(
            "Errors", "stat",
            "Share of requests that failed on our side: the model raised, its worker died, or time ran "
            "out. The log has each error by its request id; `last_error` has the model's last.",
            (Query(_share(OURS), "errors"),),
            unit="percentunit", width=4, height=4, none="no requests",
            steps=((0, "green"), (0.01, "yellow"), (0.05, "red")),
        ),
        Panel(
            "p95", "stat",
            "19 of 20 answers were faster, whole and with the reading of the body. Is it the queue or "
            "the model? See Queue against compute.",
            (Query(quantile(0.95, DURATION), "p95"),),
            unit="s", width=4, height=4, none="no requests",
        ),
        Panel(
            "Inside", "stat", "Requests that hold a model now, those that wait for a batch included.",
            (Query(f"sum({model('inference_in_flight')})", "inside"),),
            width=4, height=4,
        ),
        Panel(
            "Waiting", "stat",
            "Requests that wait for a batch now. Steadily above 0: add `instances`, or a larger "
            "`batching.max_size`.",
            (Query(f"sum({model('inference_queue_length')})", "waiting"),),
            width=4, height=4,
        ),
        Panel(
            "Turned away", "stat",
            "Requests a second that were refused to protect the server (429, 503, 413).",
            (Query(f"{rate(server('load_shed_total'))} or vector(0)", "refused"),),
            unit="reqps", width=4, height=4, steps=((0, "green"), (0.1, "yellow"), (10, "red")),
        ),
    ),
)  # fmt: skip

ANSWERS = Row(
    "Answers",
    (
        Panel(
            "Rate of each model", "lines",
            "Requests a second. `_unknown`: a client asks for a model that does not lie here.",
            (Query(rate(_outcomes(), "model"), "{{model}}"),), unit="reqps",
        ),
        Panel(
            "How they ended", "stack",
            "`rejected`: queue full or no room, safe to ask again. `canceled`: the client left. "
            "`bad_request`: the client's fault. `backend_error`, `timeout`: ours.",
            (Query(rate(_outcomes(), "outcome"), "{{outcome}}"),), unit="reqps",
        ),
        Panel(
            "Errors of each model", "lines",
            "Share of its requests that failed on our side. One model: look at its files and log. All: "
            "look at the machine (memory, disk, GPU).",
            (Query(f"{rate(_outcomes(OURS), 'model')} / ({rate(_outcomes(), 'model')} > 0)",
                   "{{model}}"),),
            unit="percentunit", none="no errors", steps=((0, "green"), (0.05, "red")),
        ),
        Panel(
            "Duration", "lines",
            "Of successful requests, all chosen models. p99 far above p50: few requests wait long, "
            "for a batch, a load, or a long text. A point of an exemplar has the trace's id.",
            tuple(Query(quantile(q, DURATION), word, exemplar=True) for q, word in QUANTILES),
            unit="s", none="no requests",
        ),
        Panel(
            "p99 of each model", "lines",
            "1 of 100 answers took longer. From 2.5 s on it is only said that it was more.",
            (Query(quantile(0.99, DURATION, "model"), "{{model}}"),), unit="s", none="no requests",
        ),
        Panel(
            "Queue against compute", "stack",
            "Seconds of a request in the mean. Queue above compute: more `instances`, larger batches, "
            "or fewer requests at once. Compute rises: larger inputs, or a GPU that others use too.",
            (Query(_in_phase("queue"), "queue"), Query(_in_phase("compute"), "compute")),
            unit="s", none="no requests",
        ),
    ),
)  # fmt: skip

BATCHES = Row(
    "Batches and queues",
    (
        Panel(
            "Size of batches", "lines",
            "Rows of the batch that a request was part of, in the mean. 1 under load: the model does "
            "not batch (`batching:` in its config), or requests differ in shape.",
            (Query(mean(model("inference_batch_size"), "model"), "{{model}}"),),
            none="no model that batches was asked",
        ),
        Panel(
            "Rows and calls", "lines",
            "Rows given to models, and calls of models. The more they differ, the more batching saves.",
            (
                Query(rate(model("inference_samples_total")), "rows"),
                Query(rate(model("inference_executions_total")), "calls"),
            ),
            unit="ops",
        ),
        Panel(
            "Waiting for a batch", "lines",
            "p95, of models that batch. About `batching.max_delay_s` is as it should be.",
            (Query(quantile(0.95, model("inference_queue_duration_seconds"), "model"), "{{model}}"),),
            unit="s", none="no model that batches was asked",
        ),
        Panel(
            "Inside and waiting", "lines",
            "Requests that hold a model, and those of them that wait. For an autoscaler: scale on "
            "waiting, not on utilization.",
            (
                Query(total("model", model("inference_in_flight")), "{{model}} inside"),
                Query(total("model", model("inference_queue_length")), "{{model}} waiting"),
            ),
        ),
        Panel(
            "Waiting for a load", "lines",
            "Requests for models that are being loaded because of them. For long: the load fails again "
            "and again, or there is no room; the Repository board shows which.",
            (Query(total("model", model("demand_waiting")), "{{model}}"),),
            none="models are not loaded on demand", needs="demand",
        ),
        Panel(
            "Turned away, by reason", "lines",
            "`queue_full`, `deadline`: more instances or machines. `rate_limit`: one client asks a lot. "
            "`body_size`: `--max-body`. `draining`: the server shuts down.",
            (Query(rate(server("load_shed_total"), "reason"), "{{reason}}"),),
            unit="reqps", none="nobody was turned away",
        ),
    ),
)  # fmt: skip

TEXTS = Row(
    "Texts and adapters",
    (
        Panel(
            "Tokens", "lines",
            "A second: read (`prompt`) and written (`completion`). Falling while requests wait: longer "
            "prompts, or the cache of keys and values is full.",
            (Query(rate(model("tokens_total"), "model, kind"), "{{model}} {{kind}}"),),
            unit="ops", none=NO_TEXT, needs="text",
        ),
        Panel(
            "First token", "lines",
            "From the request to the first token: what people feel. Rising: prompts became longer, or "
            "more texts are written than fit into a step.",
            tuple(Query(quantile(q, FIRST), word) for q, word in QUANTILES),
            unit="s", none=NO_TEXT, needs="text",
        ),
        Panel(
            "Requests of each adapter", "lines",
            "A second. `_other`: those beyond the hundred that have series of their own.",
            (Query(rate(model("adapter_requests_total"), "model, adapter"), "{{model}} {{adapter}}"),),
            unit="reqps", none="no adapters", needs="adapters",
        ),
        Panel(
            "Adapters by state", "lines",
            "`failed`: a worker would not take it; `GET /v1/models/NAME` says why (rank, shapes, base).",
            (Query(total("state", model("adapter_state")), "{{state}}"),),
            none="no adapters", needs="adapters",
        ),
        Panel(
            "Adapters that were taken, or not", "table",
            "Times that workers took an adapter, or would not, in the time shown. Many `success` of "
            "one: more adapters are in use than fit at once.",
            (Query(f"{grown(model('adapter_load_total'), 'model, adapter, outcome', RANGE)} > 0", "",
                   instant=True),),
            none="no adapters", needs="adapters",
            columns=(("model", "Model"), ("adapter", "Adapter"), ("outcome", "Outcome"),
                     ("Value", "Times")),
        ),
        Panel(
            "Protocols", "stack", "Requests a second by the protocol that clients speak.",
            (Query(rate(_outcomes(), "protocol"), "{{protocol}}"),), unit="reqps",
        ),
    ),
)  # fmt: skip

INFERENCE = Board(
    "modeldepot-inference",
    "Model Depot / Inference",
    "How much is asked, how it is answered, and where the time goes.",
    (NOW, ANSWERS, BATCHES, TEXTS),
    (
        Mark(
            "Loads and reloads",
            f"{grown(model('model_load_total', outcome='success'), 'model, trigger')} > 0",
            "blue",
            "{{model}} was loaded ({{trigger}})",
        ),
    ),
)
