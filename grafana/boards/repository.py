"""Board "Repository": what lies in the folder, what serves, and how changes went."""

from __future__ import annotations

from grafana.panels import STATES, Board, Panel, Query, Row
from grafana.promql import RANGE, grown, mean, model, rate, server, total


def _states() -> str:
    """Each version's state as the number of STATES."""
    each = " or ".join(
        f"{number} * ({model('model_state', state=word)} == 1)"
        for number, (word, _) in STATES.items()
    )
    return f"max by (model, version) ({each})"


def _count(title: str, words: str, colour: str, help: str) -> Panel:
    return Panel(
        title, "stat", help,
        (Query(total("", server("models", f'state=~"{words}"')), title),),
        width=3, height=4, steps=((0, "green"), (1, colour)) if colour else (),
    )  # fmt: skip


NOW = Row(
    "Now",
    (
        Panel(
            "Server", "stat",
            "1 once all that was wanted at the start has settled, 0 while it starts or shuts down. "
            "If it stays at 0: `GET /health` names the models that are waited for.",
            (Query(f"min({server('server_ready')})", "ready"),),
            width=3, height=4, words={0: ("not ready", "red"), 1: ("ready", "green")},
            none="no server answers",
        ),
        Panel(
            "Folder watcher", "stat",
            "0: changes in the folder are not noticed any more. Look in the server's log for "
            "`watch`; on many files raise fs.inotify.max_user_watches (`modeldepot doctor` tells).",
            (Query(f"min({server('watch_up')})", "watcher"),),
            width=3, height=4, words={0: ("down", "red"), 1: ("up", "green")},
            none="nothing is watched",
        ),
        _count(
            "Loaded", "loaded", "",
            "Models that serve. Fewer than yesterday: see Failed and Unloaded beside.",
        ),
        _count(
            "On their way", "loading|unloading", "blue",
            "Models that are being loaded or unloaded. A number that stays: see the state timeline.",
        ),
        _count(
            "Unloaded", "unloaded", "",
            "Models that lie there and do not run; those that sleep too.",
        ),
        _count(
            "Failed", "failed", "red",
            "Models that should serve and do not. `GET /v1/models/NAME` has the reason in `last_error`.",
        ),
        Panel(
            "Runs", "table",
            "The versions of what runs; more than one row during a rollout.",
            (Query(server("build_info"), "", instant=True),),
            width=6, height=4, none="no server answers",
            columns=(("instance", "Server"), ("version", "Version"), ("torch", "torch"),
                     ("onnxruntime", "onnxruntime")),
        ),
    ),
)  # fmt: skip

STATE = Row(
    "Models",
    (
        Panel(
            "State of each model", "states",
            "A bar for each version. Red: it failed, `last_error` in `GET /v1/models/NAME` says why. "
            "Blue for long: it loads slowly, see the phases below. Many colours in a row: it flaps.",
            (Query(_states(), "{{model}}:{{version}}"),),
            width=24, height=9, words=STATES, none="no model lies in the folder",
        ),
        Panel(
            "What serves", "table",
            "The newest generation of each version: its backend and where it runs.",
            (Query(model("model_info"), "", instant=True),),
            width=12, height=8, none="nothing serves",
            columns=(("model", "Model"), ("version", "Version"), ("backend", "Backend"),
                     ("device", "Device"), ("generation", "Generation")),
        ),
        Panel(
            "Last change of state", "bars",
            "How long each model has been in the state that it is in. Short for all: the server has "
            "just started, or somebody deploys.",
            (Query(f"time() - max by (model) ({model('model_last_transition_timestamp_seconds')})",
                   "{{model}}", instant=True),),
            unit="s", width=12,
        ),
    ),
)  # fmt: skip

LOADS = Row(
    "Loads and reloads",
    (
        Panel(
            "Loads by outcome", "events",
            "Loads that ended, by what caused them. `failure`: see why to the right; what served "
            "before serves on. `superseded`: the folder changed again meanwhile, all is well.",
            (Query(f"{grown(model('model_load_total'), 'trigger, outcome')} > 0",
                   "{{trigger}}: {{outcome}}"),),
            none="no load in this time",
        ),
        Panel(
            "Why loads failed", "table",
            "In the time that is shown. `oom`: give it more memory or a smaller model. `config`, "
            "`missing_file`: repair the folder. `incomplete`: it was still being copied. `security`: "
            "it needs `--trust-code`. `check`: its golden answers differ. `timeout`: `load_timeout_s`.",
            (Query(f"{grown(model('model_load_failures_total'), 'model, reason', RANGE)} > 0", "",
                   instant=True),),
            none="no load failed",
            columns=(("model", "Model"), ("reason", "Reason"), ("Value", "Times")),
        ),
        Panel(
            "Duration of the last load", "lines",
            "Of each model, from the wish on. Rising: larger files, a slower disk, or loads that wait "
            "for each other (phase `queue`).",
            (Query(f"max by (model) ({model('model_last_load_duration_seconds')})", "{{model}}"),),
            unit="s", none="nothing was loaded",
        ),
        Panel(
            "Where loads take their time", "bars",
            "Mean of the time that is shown, by backend and phase. `read`: disk. `build`: framework. "
            "`queue`: memory or a turn was waited for. `warmup`: fewer or smaller requests there help.",
            (Query(mean(server("model_load_duration_seconds"), "backend, phase", RANGE),
                   "{{backend}} {{phase}}", instant=True),),
            unit="s", none="no load in this time",
        ),
        Panel(
            "From file to serving", "lines",
            "From the last change of a file to the new generation serving: what a deployment takes. "
            "Long although loads are short: the folder was not at rest (`settle`) or is not watched.",
            (
                Query(mean(server("watch_lag_seconds"), over="10m"), "mean of 10 minutes"),
                Query(
                    "histogram_quantile(0.95, "
                    f"{grown(server('watch_lag_seconds_bucket'), 'le', '10m')}) >= 0",
                    "p95 of 10 minutes",
                ),
            ),
            unit="s", none="nothing was changed in the folder",
        ),
        Panel(
            "Unloads", "events",
            "Generations that left: replaced (`reload`), no longer wanted, or evicted for others.",
            (Query(f"{grown(model('model_unload_total'), 'trigger, outcome')} > 0",
                   "{{trigger}}: {{outcome}}"),),
            none="nothing left in this time",
        ),
    ),
)  # fmt: skip

UNREST = Row(
    "Unrest",
    (
        Panel(
            "Changes of state", "events",
            "A model that goes to and fro flaps: it crashes (restarts, to the right), its folder is "
            "being rewritten, or models take turns because memory is short (evictions).",
            (Query(f"{grown(model('model_state_transitions_total'), 'model')} > 0", "{{model}}"),),
            none="no change in this time",
        ),
        Panel(
            "Evictions", "events",
            "Models that left for others (`memory`), after their idle time (`idle_ttl`) or by call. "
            "Steadily: the budget is too small for what is asked for; pin what must stay.",
            (Query(f"{grown(model('model_evictions_total'), 'model, reason')} > 0",
                   "{{model}}: {{reason}}"),),
            none="nobody had to leave",
        ),
        Panel(
            "Restarts after a failure", "events",
            "New generations after one had died. The log has the signal or the exit code; SIGKILL "
            "without a reason is most often the kernel's out-of-memory killer.",
            (Query(f"{grown(model('worker_restarts_total'), 'model, device')} > 0",
                   "{{model}} on {{device}}"),),
            none="nothing had to be restarted",
        ),
        Panel(
            "Workers", "lines",
            "1 while a model's workers serve, 0 when the newest attempt has failed.",
            (Query(f"min by (model, device) ({model('worker_up')})", "{{model}} on {{device}}"),),
            top=1.2, none="nothing runs",
        ),
        Panel(
            "What the watcher saw", "lines",
            "Changes a second. `settling` for long: something writes into the folder all the time.",
            (Query(rate(server("watch_events_total"), "action"), "{{action}}"),),
            unit="ops", none="nothing changed",
        ),
        Panel(
            "Scan of the folder", "lines",
            "Mean duration of a whole scan. Seconds: a network disk, or very many files.",
            (Query(mean(server("repository_scan_duration_seconds")), "mean"),),
            unit="s",
        ),
        Panel(
            "Models the last scan found", "lines",
            "Falls to 0: the folder was not mounted, or was emptied.",
            (Query(total("repository", server("repository_models")), "{{repository}}"),),
        ),
        Panel(
            "Refused for want of a key", "lines",
            "Requests a second without the key or scope that they needed. One client that was "
            "forgotten at a change of keys, or somebody who tries.",
            (Query(rate(server("auth_failures_total"), "scope"), "{{scope}}"),),
            unit="reqps", none="nobody was refused",
        ),
        Panel(
            "State steps that should not be", "stat",
            "Anything but 0 is a bug of the server: please report it with the log around that time.",
            (Query(f"sum({server('illegal_moves_total')})", "steps"),),
            steps=((0, "green"), (1, "red")),
        ),
    ),
)  # fmt: skip

REPOSITORY = Board(
    "modeldepot-repository",
    "Model Depot / Repository",
    "What lies in the folder, what serves, how loads and reloads went.",
    (NOW, STATE, LOADS, UNREST),
)
