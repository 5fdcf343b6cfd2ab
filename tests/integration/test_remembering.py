"""What was said by call holds after a restart; what was nobody's wish does not."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from contextlib import asynccontextmanager, closing

import numpy as np
import pytest

from repository.errors import ConfigError, LoadFailedError, NotKeptError
from repository.lifecycle.wishes import Word
from repository.messages import InferRequest
from repository.repository import Options, Repository
from repository.statefile import StateFile
from repository.tensors import Tensor
from tests.adapters import write_adapter
from tests.models import python_model

pytestmark = pytest.mark.timeout(60)

# Adds lora_alpha of the adapter of each row.
ADDS = """
    import json
    import numpy as np
    class Model:
        inputs = [("x", "FP32", (2,))]
        outputs = [("y", "FP32", (2,))]
        def __init__(self):
            self.alphas = {"": 0.0}
        def add_adapter(self, name, path, options):
            self.alphas[name] = json.loads((path / "adapter_config.json").read_text())["lora_alpha"]
        def remove_adapter(self, name):
            del self.alphas[name]
        def infer(self, inputs, adapters):
            more = np.array([self.alphas[name] for name in adapters], np.float32)
            return {"y": inputs["x"] + more[:, None]}
"""


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "models"
    for name in ("m", "n"):
        python_model(path / name / "1", ADDS)
        (path / name / "config.yaml").write_text("max_batch_size: 8\n")
    return path


@asynccontextmanager
async def serving(root, **options):
    """Ready: what was wanted at the start serves."""
    options = {"settle_s": 0.0, "default_host": "inline", "watch": "off", **options}
    models = Repository(Options(root, trust_code=True, state_dir=root.parent / "state", **options))
    async with models.running():
        async with asyncio.timeout(20):
            with models.events.subscribe(after=0) as events:
                while not models.ready:
                    await anext(events)
        yield models


def loaded(models):
    return [s.name for s in models.statuses() if s.state == "loaded"]


async def ask(models, **parameters):
    x = Tensor.of("x", np.zeros((1, 2), np.float32))
    with models.lease("m") as gen:
        response = await models.infer(gen, InferRequest([x], parameters=parameters))
    return float(response.outputs[0].array()[0, 0])


@pytest.fixture
def broken_disk(monkeypatch):
    """Its list holds what writing raises, while it holds anything."""
    errors = []
    write = StateFile.write

    def maybe(self, facts):
        if errors:
            raise errors[0]
        write(self, facts)

    monkeypatch.setattr(StateFile, "write", maybe)
    return errors


async def test_the_last_word_wins_over_the_mode_at_the_next_start(root):
    async with serving(root) as models:
        assert loaded(models) == ["m", "n"]
        await models.unload("m")
    async with serving(root) as models:
        assert loaded(models) == ["n"]
        assert models.status("m").wanted is False
        await models.load("m")
        await models.unload("n")
    async with serving(root, mode="explicit", load=("n",)) as models:
        assert loaded(models) == ["m"]
        await models.load("n")
        await models.unload_all()
    async with serving(root, mode="none") as models:
        assert loaded(models) == []
    async with serving(root, forget=True) as models:
        assert loaded(models) == ["m", "n"]
    async with serving(root) as models:
        assert loaded(models) == ["m", "n"]


async def test_a_load_of_what_the_mode_has_loaded_is_remembered_as_well(root):
    async with serving(root) as models:
        await models.load("m")
        models._models.wishes.withdraw("m")  # as for a later load that finds no room
    async with serving(root, mode="explicit") as models:
        assert loaded(models) == ["m"]


async def test_requests_that_load_a_model_are_nobodys_wish(root):
    async with serving(root, mode="explicit", on_demand=True) as models:
        await models.unload("n")
        for name in ("m", "n"):
            leases = []
            await models.demand(name, None, leases.append)
            leases[0].end()
        assert loaded(models) == ["m", "n"]
    async with serving(root, mode="explicit") as models:
        assert loaded(models) == []
        assert models._models.wishes.word("n") is Word.UNLOAD


async def test_a_folder_that_goes_takes_what_was_said_of_it_with_it(root):
    async with serving(root) as models:
        write_adapter(root / "shared" / "a", lora_alpha=3)
        await models.register_adapter("m", "a", "../shared/a")
        await models.unload("m")
        await models.unload("n")
        gone = (root / "m").rename(root.parent / "gone")
        with pytest.raises(Exception, match="no model 'm'"):
            await models.load("m")
    gone.rename(root / "m")
    async with serving(root) as models:
        assert loaded(models) == ["m"] and models.adapters("m") == []


async def test_adapters_come_back_as_they_were_registered_before_the_model_is_ready(root):
    home = root / "m" / "adapters"
    for name, alpha in (("own", 1), ("away", 2), ("plain", 3)):
        write_adapter(home / name, lora_alpha=alpha)
    for name, alpha in (("one", 10), ("gone", 20), ("left", 30)):
        write_adapter(root / "shared" / name, lora_alpha=alpha)
    async with serving(root) as models:
        await models.register_adapter("m", "one", "../shared/one", pin=True, options={"k": "v"})
        await models.register_adapter("m", "gone", "../shared/gone")
        await models.register_adapter("m", "left", "../shared/left")
        await models.unregister_adapter("m", "left")
        await models.unregister_adapter("m", "away")
        await models.update_adapter("m", "own", pin=True)
        assert await ask(models, adapter="one") == 10
    shutil.rmtree(root / "shared" / "gone")
    for _ in range(2):
        async with serving(root) as models:
            views = {view.name: view for view in models.adapters("m")}
            assert sorted(views) == ["gone", "one", "own", "plain"]
            assert [n for n, view in views.items() if view.pin] == ["one", "own"]
            assert views["one"].origin == "call" and views["one"].options == {"k": "v"}
            assert views["one"].state == views["own"].state == "loaded"
            assert views["own"].origin == "folder" and not views["plain"].preload
            assert views["gone"].state == "failed" and "no folder" in views["gone"].error
            assert await ask(models, adapter="one") == 10
            assert await ask(models, adapter="own") == 1
    async with serving(root) as models:
        await models.unregister_adapter("m", "gone")
        await models.register_adapter("m", "away", "adapters/away")
    async with serving(root) as models:
        assert sorted(v.name for v in models.adapters("m")) == ["away", "one", "own", "plain"]


async def test_a_config_that_a_load_brought_comes_back(root):
    async with serving(root) as models:
        await models.load("m", config={"max_batch_size": 3})
    async with serving(root) as models:
        assert models.lease("m").generation.spec.config.max_batch_size == 3
        await models.load("m", config=None)
    async with serving(root) as models:
        assert models.lease("m").generation.spec.config.max_batch_size == 8


async def test_a_config_that_was_left_out_at_the_start_is_forgotten_by_a_load_without_one(root):
    async with serving(root) as models:
        await models.load("m", config={"max_batch_size": 3})
    with closing(sqlite3.connect(root.parent / "state" / "journal.sqlite")) as base, base:
        base.execute("""UPDATE facts SET value = '{"unheard_of": 1}' WHERE kind = 'override'""")
    async with serving(root) as models:
        assert (await models.load("m", config=None)).applied == {}
    with closing(sqlite3.connect(root.parent / "state" / "journal.sqlite")) as base:
        assert not base.execute("SELECT 1 FROM facts WHERE kind = 'override'").fetchall()


async def test_a_config_that_fails_in_one_version_is_no_wish_though_another_one_served(root):
    (root / "m" / "config.yaml").write_text("version_policy: all\n")
    python_model(root / "m" / "2", "import asyncio\nraise OSError('broken')")
    async with serving(root, mode="explicit") as models:
        await models.unload("m")
        with pytest.raises(LoadFailedError):
            await models.load("m", config={"max_batch_size": 3})
        assert not models.status("m").wanted
        assert any(gen.ready_at for gen in models.status("m").generations)
    async with serving(root) as models:
        assert loaded(models) == ["n"]


async def test_a_folder_from_elsewhere_comes_back_with_its_adapters(root, tmp_path):
    far = tmp_path / "more" / "far"
    python_model(far / "1", ADDS)
    (far / "config.yaml").write_text("max_batch_size: 8\n")
    write_adapter(far / "loras" / "a", lora_alpha=3)
    allowed = {"allowed_roots": (tmp_path / "more",), "mode": "explicit"}
    async with serving(root, **allowed) as models:
        report = await models.load(str(far))
        await models.register_adapter(report.model, "a", "loras/a")
    async with serving(root, **allowed) as models:
        assert loaded(models) == ["far"]
        assert [v.state for v in models.adapters("far")] == ["loaded"]


async def test_where_nothing_can_be_kept_the_answer_says_what_was_done(root, broken_disk):
    write_adapter(root / "shared" / "a", lora_alpha=3)
    async with serving(root, mode="explicit") as models:
        broken_disk.append(OSError(28, "No space left on device"))
        with pytest.raises(NotKeptError, match=r"'m' is loaded, but .*No space left"):
            await models.load("m")
        assert loaded(models) == ["m"]
        with pytest.raises(NotKeptError, match=r"the adapter 'a' was not registered: .*No space"):
            await models.register_adapter("m", "a", "../shared/a")
        assert models.adapters("m") == []
        with pytest.raises(NotKeptError, match="'m' is unloaded, but a restart may not know"):
            await models.unload("m")
        assert loaded(models) == []
        with pytest.raises(NotKeptError, match="all models are unloaded"):
            await models.unload_all()
        broken_disk.clear()
        await models.register_adapter("m", "a", "../shared/a")
        await models.load("n")
    async with serving(root) as models:
        assert loaded(models) == ["n"]
        assert [v.name for v in models.adapters("m")] == ["a"]


async def test_without_a_state_folder_of_its_own_it_is_in_the_repository_and_no_model(root):
    options = Options(root, trust_code=True, settle_s=0.0, mode="explicit")
    models = Repository(options)
    async with models.running():
        await models.unload("m")
        assert models.names() == ["m", "n"]
    assert (root / ".modeldepot" / "journal.sqlite").exists()


async def test_two_repositories_do_not_share_a_state_folder(root):
    async with serving(root, mode="explicit") as models:
        other = Repository(models.options)
        other._journal._file._lock_wait_s = 0.05
        with pytest.raises(ConfigError, match="another server"):
            async with other.running():
                pass
        await models.unload("m")
