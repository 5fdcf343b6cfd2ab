"""The same truth under the names that Triton's `/metrics` has, for dashboards made for it.

Names, labels and units are Triton's: times in whole microseconds, labels model, version, and gpu_uuid
where the model is on a GPU; a version's series are there while it serves. They are of the type unknown,
because a counter's name would have to end in `_total`: prometheus_client renames it, and promtool
refuses it. What this server does not have (a pool of pinned memory, energy) is left out: a zero would
say that it was measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from repository.reports import DeviceReport, HostReport
from server.metrics.lines import Sheet
from server.metrics.names import Family
from server.metrics.reading import GenerationRow, ModelRow, WorkRow
from server.metrics.rows import gpu_of
from server.metrics.tally import Frozen, Tally

# Why requests failed, as Triton says it: by our outcome.
REASONS = {
    "rejected": "REJECTED", "timeout": "REJECTED", "canceled": "CANCELED",
    "backend_error": "BACKEND", "bad_request": "OTHER",
}  # fmt: skip


def _of_model(name: str, help_: str, *more: str) -> tuple[Family, Family]:
    """Two with one name: without a GPU, and with."""
    full = "nv_" + name
    labels = ("model", "version", *more)
    return (
        Family(full, "unknown", help_, labels, prefix=""),
        Family(full, "unknown", help_, ("gpu_uuid", *labels), prefix=""),
    )


def _plain(name: str, help_: str, *labels: str) -> Family:
    return Family("nv_" + name, "unknown", help_, labels, prefix="")


SUCCESS = _of_model("inference_request_success", "Successful requests.")
FAILURE = _of_model("inference_request_failure", "Failed requests, by reason.", "reason")
COUNT = _of_model("inference_count", "Inferences performed; a batch of n counts n times.")
EXEC_COUNT = _of_model("inference_exec_count", "Calls of the model.")
REQUEST_US = _of_model("inference_request_duration_us", "Successful requests, end to end.")
QUEUE_US = _of_model("inference_queue_duration_us", "Of it, waiting.")
INPUT_US = _of_model("inference_compute_input_duration_us", "Of it, taking in what was sent.")
INFER_US = _of_model("inference_compute_infer_duration_us", "Of it, inside the model.")
OUTPUT_US = _of_model("inference_compute_output_duration_us", "Of it, writing the answer.")
PENDING = _of_model("inference_pending_request_count", "Requests that wait.")
HITS = _of_model("cache_num_hits_per_model", "Requests whose answer was there already.")
MISSES = _of_model("cache_num_misses_per_model", "Requests that were looked up and not found.")
HIT_US = _of_model("cache_hit_duration_per_model", "Looking up those whose answer was there.")
MISS_US = _of_model(
    "cache_miss_duration_per_model", "Looking up the others, and keeping their answers."
)
LOAD_S = _of_model("model_load_duration_secs", "How long its load took.")

GPU_UTILIZATION = _plain("gpu_utilization", "Busy share of the time.", "gpu_uuid")
GPU_TOTAL = _plain("gpu_memory_total_bytes", "Memory of the GPU.", "gpu_uuid")
GPU_USED = _plain("gpu_memory_used_bytes", "Of it, in use.", "gpu_uuid")
GPU_POWER = _plain("gpu_power_usage", "Watts drawn now.", "gpu_uuid")
GPU_LIMIT = _plain("gpu_power_limit", "Watts that may be drawn.", "gpu_uuid")
CPU_UTILIZATION = _plain("cpu_utilization", "Busy share of the time, of all cores.")
CPU_TOTAL = _plain("cpu_memory_total_bytes", "Memory of the machine.")
CPU_USED = _plain("cpu_memory_used_bytes", "Of it, in use.")

OF_MODELS = (
    SUCCESS, FAILURE, COUNT, EXEC_COUNT, REQUEST_US, QUEUE_US, INPUT_US, INFER_US, OUTPUT_US, PENDING,
    HITS, MISSES, HIT_US, MISS_US, LOAD_S,
)  # fmt: skip
OF_DEVICES = (
    GPU_UTILIZATION, GPU_TOTAL, GPU_USED, GPU_POWER, GPU_LIMIT, CPU_UTILIZATION, CPU_TOTAL, CPU_USED,
)  # fmt: skip
# In the order of a page; those of one name stand together.
ALL: tuple[tuple[Family, ...], ...] = (*OF_MODELS, *((family,) for family in OF_DEVICES))

NO_TALLY = Tally()


def uuids(devices: Iterable[DeviceReport]) -> dict[str, str]:
    """device -> UUID, of the GPUs that say theirs."""
    return {d.device: d.uuid for d in devices if d.uuid and gpu_of(d.device) is not None}


def put_model(sheet: Sheet, model: ModelRow, tallies: Frozen, gpus: Mapping[str, str]) -> None:
    serving: dict[int, list[tuple[GenerationRow, WorkRow]]] = {}
    for row, work in zip(model.rows, model.work, strict=True):
        if row.ready:
            serving.setdefault(row.version, []).append((row, work))
    for version, rows in serving.items():
        uuid = gpus.get(rows[0][0].device)
        labels: tuple[str, ...] = (model.name, str(version))
        which = 0 if uuid is None else 1
        if uuid is not None:
            labels = (uuid, *labels)
        _put_version(
            sheet, which, labels, [work for _, work in rows], tallies.get(version, NO_TALLY)
        )
        load_s = rows[0][0].load_s
        if load_s is not None:
            sheet.add(LOAD_S[which], load_s, *labels)


def _put_version(
    sheet: Sheet, which: int, labels: tuple[str, ...], works: list[WorkRow], tally: Tally
) -> None:
    ended = dict.fromkeys(("REJECTED", "CANCELED", "BACKEND", "OTHER"), 0)
    good = 0
    for (_, outcome), count in tally.requests.items():
        if outcome == "success":
            good += count
        else:
            ended[REASONS.get(outcome, "OTHER")] += count
    values = (
        (SUCCESS, good),
        (COUNT, tally.samples + sum([work.samples for work in works])),
        (EXEC_COUNT, tally.executions + sum([work.executions for work in works])),
        (REQUEST_US, int(tally.duration.total * 1e6)),
        (QUEUE_US, int(tally.queue_s * 1e6)),
        (INPUT_US, int((tally.input_s - tally.idle_input_s) * 1e6)),
        (INFER_US, int(tally.compute_s * 1e6)),
        (OUTPUT_US, int((tally.output_s - tally.idle_output_s) * 1e6)),
        (PENDING, sum([work.waiting for work in works])),
    )
    for families, value in values:
        sheet.add(families[which], value, *labels)
    for reason, count in ended.items():
        sheet.add(FAILURE[which], count, *labels, reason)
    lookups = tally.all_lookups(work.lookups for work in works)
    if lookups is not None:
        sheet.add(HITS[which], lookups.hits, *labels)
        sheet.add(MISSES[which], lookups.misses, *labels)
        sheet.add(HIT_US[which], int(lookups.hit_s * 1e6), *labels)
        sheet.add(MISS_US[which], int(lookups.miss_s * 1e6), *labels)


def put_devices(sheet: Sheet, devices: Iterable[DeviceReport], host: HostReport | None) -> None:
    for device in devices:
        if gpu_of(device.device) is None or not device.uuid:
            continue
        told = (
            (GPU_UTILIZATION, device.utilization), (GPU_TOTAL, device.total),
            (GPU_USED, device.used), (GPU_POWER, device.power_w), (GPU_LIMIT, device.power_limit_w),
        )  # fmt: skip
        for family, value in told:
            if value is not None:
                sheet.add(family, value, device.uuid)
    if host is not None:
        sheet.add(CPU_UTILIZATION, host.busy)
        sheet.add(CPU_TOTAL, host.total)
        sheet.add(CPU_USED, host.used)
