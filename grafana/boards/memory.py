"""Board "Memory": whose the bytes are, what is left, and whether they come back."""

from __future__ import annotations

from grafana.panels import Board, Mark, Panel, Query, Row
from grafana.promql import RANGE, gpu, grown, model, server, total

NO_GPU = "no GPU"
ON_GPUS = 'device=~"cuda:($gpu)"'
ON_HOST = 'device!~"cuda:.*"'

GPUS = Row(
    "GPUs",
    (
        Panel(
            "Used of each GPU", "stat",
            "By everybody, as NVML says. Above 95 %: a request that needs scratch memory may fail; "
            "lower `--memory-budget`, or unload something.",
            (Query(f"{gpu('gpu_memory_used_bytes')} / {gpu('gpu_memory_total_bytes')}",
                   "GPU {{gpu}}"),),
            unit="percentunit", width=5, height=5, none=NO_GPU, needs="gpu", top=1,
            steps=((0, "green"), (0.9, "yellow"), (0.95, "red")),
        ),
        Panel(
            "Unattributed", "stat",
            "Used, but by no worker of ours: another program, or a process that should have ended. "
            "`nvidia-smi` names who; admission leaves this much out of what models may take.",
            (Query(gpu("gpu_memory_unattributed_bytes"), "GPU {{gpu}}"),),
            unit="bytes", width=5, height=5, none=NO_GPU, needs="gpu",
            steps=((0, "green"), (2**30, "yellow"), (4 * 2**30, "red")),
        ),
        Panel(
            "GPU answers", "stat",
            "0: NVML does not answer for it. `nvidia-smi` and the kernel's log (Xid) say why; the "
            "server goes on with what it knew.",
            (Query(gpu("gpu_collector_up"), "GPU {{gpu}}"),),
            width=4, height=5, none=NO_GPU, needs="gpu",
            words={0: ("lost", "red"), 1: ("yes", "green")},
        ),
        Panel(
            "Busy", "stat",
            "Share of the time in which a kernel ran, and the power drawn. Temperature, ECC and Xid "
            "are left to NVIDIA's DCGM exporter; `gpu_uuid` joins the two.",
            (Query(gpu("gpu_utilization_ratio"), "GPU {{gpu}}"),),
            unit="percentunit", width=4, height=5, none=NO_GPU, needs="gpu", top=1,
        ),
        Panel(
            "Which GPUs", "table",
            "As NVML names them. Empty where the machine has none: models run on the CPU then.",
            (Query(gpu("gpu_info"), "", instant=True),),
            width=6, height=5, none=NO_GPU, needs="gpu",
            columns=(("gpu", "GPU"), ("name", "Name"), ("driver", "Driver")),
        ),
        Panel(
            "Memory of the chosen GPUs", "stack",
            "What each model's workers say they use, upon each other; the lines are what models may "
            "take (budget), what NVML says is used by everybody, and all there is. A gap between the "
            "pile and `used`: see Unattributed.",
            (
                Query(total("model", model("model_memory_bytes", ON_GPUS)), "{{model}}"),
                Query(f"sum({gpu('gpu_memory_budget_bytes')})", "budget", line=True),
                Query(f"sum({gpu('gpu_memory_used_bytes')})", "used (NVML)", line=True),
                Query(f"sum({gpu('gpu_memory_total_bytes')})", "all", line=True),
            ),
            unit="bytes", width=16, height=10, none=NO_GPU, needs="gpu",
        ),
        Panel(
            "What it is used for", "stack",
            "By kind: `weights`, `kv` (caches of text models), `adapters`, `workspace` (scratch), "
            "`context` (CUDA's own, per process). Large `context`: many small models on one GPU.",
            (Query(total("kind", model("model_memory_bytes", ON_GPUS)), "{{kind}}"),),
            unit="bytes", height=10, none=NO_GPU, needs="gpu",
        ),
        Panel(
            "Attributed against NVML", "lines",
            "Of each GPU. The two should run side by side; `unattributed` that rises after each "
            "unload is memory that does not come back.",
            (
                Query(gpu("gpu_memory_attributed_bytes"), "attributed, GPU {{gpu}}"),
                Query(gpu("gpu_memory_unattributed_bytes"), "unattributed, GPU {{gpu}}"),
                Query(gpu("gpu_memory_reserved_bytes"), "reserved, GPU {{gpu}}"),
            ),
            unit="bytes", width=16, none=NO_GPU, needs="gpu",
        ),
        Panel(
            "Power", "lines",
            "Drawn now. High at a low rate of requests: another program computes here.",
            (Query(gpu("gpu_power_watts"), "GPU {{gpu}}"),),
            unit="watt", none=NO_GPU, needs="gpu",
        ),
    ),
)  # fmt: skip

HOST = Row(
    "Host memory",
    (
        Panel(
            "Held of the host's budgets", "stack",
            "What models hold of the memory of the CPU, and of the place for those that sleep "
            "(`host`). Lines: the budgets. Full: the next load evicts somebody or is refused (507).",
            (
                Query(total("model, device", model("model_memory_reserved_bytes", ON_HOST)),
                      "{{model}} on {{device}}"),
                Query(total("device", server("device_memory_budget_bytes", ON_HOST)),
                      "budget of {{device}}", line=True),
            ),
            unit="bytes", width=16, height=10, none="nothing is held",
        ),
        Panel(
            "Free of each budget", "stat",
            "What the next model may take. 0 is no fault: idle models leave when somebody needs it.",
            (Query(f"{total('device', server('device_memory_budget_bytes'))} - "
                   f"{total('device', server('device_memory_reserved_bytes'))}", "{{device}}"),),
            unit="bytes", width=8, height=5, none="no device",
        ),
        Panel(
            "Host memory of workers", "lines",
            "Of all processes of a model, GPU models too. It rises and rises: a leak in the model's "
            "code; `POST /v1/models/reload` gives it back.",
            (Query(total("model", model("worker_memory_bytes")), "{{model}}"),),
            unit="bytes", width=8, height=5, none="no worker has told",
        ),
    ),
)  # fmt: skip

TRUTH = Row(
    "Estimates against reality",
    (
        Panel(
            "Measured of what was reserved", "bars",
            "1: the estimate was right. Well above: set `memory:` in the model's config, or its "
            "device may run out. Well below: it keeps others out; the next load uses the measure.",
            (Query(f"{total('model', model('model_memory_bytes'))} / "
                   f"({total('model', model('model_memory_reserved_bytes'))} > 0)", "{{model}}",
                   instant=True),),
            unit="percentunit", none="nothing was measured",
            steps=((0, "green"), (1.05, "yellow"), (1.25, "red")),
        ),
        Panel(
            "Estimated, before the load", "lines",
            "Computed from the files, configured, or measured at an earlier load.",
            (Query(total("model", model("model_memory_estimated_bytes")), "{{model}}"),),
            unit="bytes", none="nothing was loaded",
        ),
        Panel(
            "Came back at the last unload", "bars",
            "Freed of what was to come back. Below 95 %: something kept it; leaked bytes beside say "
            "how much. A worker's end returns all, so look for processes that outlive it.",
            (Query(f"min by (model) ({model('model_memory_reclaimed_ratio')})", "{{model}}",
                   instant=True),),
            unit="percentunit", top=1, none="nothing was unloaded",
            steps=((0, "red"), (0.9, "yellow"), (0.95, "green")),
        ),
        Panel(
            "Leaked", "table",
            "Bytes that a device had not given back when the workers had ended, in the time shown. "
            "They stay out of the budget until the device says otherwise.",
            (Query(f"{grown(model('model_memory_leaked_bytes_total'), 'model', RANGE)}", "",
                   instant=True),),
            unit="bytes", none="nothing leaked", needs="leak",
            columns=(("model", "Model"), ("Value", "Bytes")),
        ),
        Panel(
            "Adapters", "stack",
            "Bytes of the tensors of each model's adapters.",
            (Query(total("model", model("adapter_memory_bytes")), "{{model}}"),),
            unit="bytes", none="no adapters", needs="adapters",
        ),
        Panel(
            "The server itself", "lines",
            "Memory of the front process, without workers. It should be flat.",
            (Query(total("instance", 'process_resident_memory_bytes{instance=~"$instance"}'),
                   "{{instance}}"),),
            unit="bytes",
        ),
    ),
)  # fmt: skip

COMING = Row(
    "Coming and going",
    (
        Panel(
            "Evictions", "events",
            "Models that left for others, or after their idle time. Steadily: the budget is too small "
            "for what is asked for. Pin what must stay, or let fewer models load on demand.",
            (Query(f"{grown(model('model_evictions_total'), 'model, reason')} > 0",
                   "{{model}}: {{reason}}"),),
            none="nobody had to leave",
        ),
        Panel(
            "Asleep", "states",
            "Models whose weights lie in host memory, so that they wake in the time of a copy. "
            "Never: `--host-tier` is 0, or no model of this kind can sleep.",
            (Query(f"max by (model) ({model('model_asleep')})", "{{model}}"),),
            none="no model can sleep here", needs="tier",
            words={0: ("awake", "green"), 1: ("asleep", "purple")},
        ),
        Panel(
            "Put to sleep and woken", "events",
            "Many in a row: models take turns, which costs each a copy of its weights.",
            (
                Query(f"{grown(model('model_sleeps_total'), 'model')} > 0", "{{model}} sleeps"),
                Query(f"{grown(model('model_wakes_total'), 'model')} > 0", "{{model}} wakes"),
            ),
            none="nothing slept", needs="tier",
        ),
    ),
)  # fmt: skip

MEMORY = Board(
    "modeldepot-memory",
    "Model Depot / Memory",
    "Whose the bytes are, what is left of the budgets, and whether memory comes back.",
    (GPUS, HOST, TRUTH, COMING),
    (
        Mark(
            "Loads and reloads",
            f"{grown(model('model_load_total', outcome='success'), 'model, trigger')} > 0",
            "blue",
            "{{model}} was loaded ({{trigger}})",
        ),
        Mark(
            "Evictions",
            f"{grown(model('model_evictions_total'), 'model, reason')} > 0",
            "orange",
            "{{model}} was evicted ({{reason}})",
        ),
    ),
)
