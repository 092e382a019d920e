"""`import chimera`: a loop of the user's own sees the trainer's steps, on any ranks and workers, from any step."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import chimera
from chimera.commands.train import main
from chimera.train.run import curriculum
from chimera.train.settings import TrainSettings
from tests.train.conftest import ROOT, SMALL, steps_of

TENSORS = ("input_ids", "labels", "position_ids")
SHAPES = [(16, 32)] * 8 + [(16, 64)] * 8 + [(16, 128)] * 14  # of the steps of SMALL


def words(shards: Path, *more: str) -> list[str]:
    return [*SMALL, f"shards={shards}", f"cache={shards.parent}/cache", "tokenizer=null", *more]


@pytest.fixture
def config(demo_shards: Path) -> TrainSettings:
    return chimera.read_config(ROOT / "yamls/demo/base.yaml", words(demo_shards))


@pytest.fixture(scope="module")
def trained(demo_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[dict[str, Any]]]:
    """Of a run of the trainer: the digests in its steps.jsonl, and the tensors its model was given at each step."""
    given = []
    view = curriculum.view_sequences

    def seen(*args: Any) -> Any:
        given.append(view(*args))
        return given[-1]

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curriculum, "view_sequences", seen)
        main([str(ROOT / "yamls/demo/base.yaml"), *words(demo_shards, f"save_folder={folder}/run")])
    return [line["digest"] for line in steps_of(folder / "run")], given


def same(found: Iterable[Any], wanted: Iterable[Any]) -> None:
    """Assert that two lists of batches hold the same tensors."""
    for mine, theirs in zip(found, wanted, strict=True):
        for name in TENSORS:
            assert mine[name].dtype == torch.int64
            assert torch.equal(mine[name], theirs[name])


def test_every_step_is_the_trainers(config: TrainSettings, trained: Any) -> None:
    digests, given = trained
    found = list(chimera.batches(config))
    assert [tuple(batch["input_ids"].shape) for batch in found] == SHAPES
    assert [batch["step"] for batch in found] == list(range(30))
    assert [batch["digest"] for batch in found] == digests
    assert [batch["phase"] for batch in found] == ["knowledge"] * 20 + ["alignment"] * 10
    same(found, given)


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_ranks_sequences_one_after_another_are_the_step(config: TrainSettings, trained: Any, ranks: int) -> None:
    digests, given = trained
    parts = [list(chimera.batches(config, rank=rank, ranks=ranks)) for rank in range(ranks)]
    for part in parts:
        assert [batch["digest"] for batch in part] == digests
        assert [batch["input_ids"].shape[0] for batch in part] == [16 // ranks] * 30
    same(({name: torch.cat([part[name] for part in step]) for name in TENSORS} for step in zip(*parts)), given)  # noqa: B905


def test_two_workers_of_a_loader_give_every_step_once_and_in_order(config: TrainSettings, trained: Any) -> None:
    _, given = trained
    data = pickle.loads(pickle.dumps(chimera.batches(config, start=5)))  # as where workers are spawned
    loader = DataLoader(data, batch_size=None, num_workers=2)
    assert len(loader) == 25
    found = list(loader)
    assert [batch["step"] for batch in found] == list(range(5, 30))
    same(found, given[5:])


@pytest.mark.parametrize("start", [7, 8, 20, 29, 30])
def test_a_start_in_the_midst_gives_the_tail_each_time_it_is_iterated(
    config: TrainSettings, trained: Any, start: int
) -> None:
    digests, given = trained
    data = chimera.batches(config, start=start, rank=1, ranks=2)
    assert len(data) == 30 - start
    for _ in range(2):
        found = list(data)
        assert [batch["digest"] for batch in found] == digests[start:]
        same(found, [{name: step[name][8:] for name in TENSORS} for step in given[start:]])


def test_they_end_and_begin_where_the_config_says(demo_shards: Path) -> None:
    bounds = words(demo_shards, "max_duration=19ba", "min_start_step=17")
    config = chimera.read_config(str(ROOT / "yamls/demo/base.yaml"), bounds)
    for workers in (0, 2):
        loader = DataLoader(chimera.batches(config, start=17), batch_size=None, num_workers=workers)
        assert [batch["step"] for batch in loader] == [17, 18]
    for start in (0, 16, 20):
        with pytest.raises(chimera.UserError, match=rf"^`start` is {start}; .* from step 17 .* to 19 "):
            chimera.batches(config, start=start)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"start": -1}, "`start` is -1; a whole number, at least 0"),
        ({"start": 2.0}, "`start` is 2.0; a whole number, at least 0"),
        ({"start": 31}, "`start` is 31; this config goes from step 0 .* to 30 "),
        ({"ranks": 0}, "`ranks` is 0; a whole number, at least 1"),
        ({"rank": -1}, "`rank` is -1; a whole number, at least 0"),
        ({"rank": 2, "ranks": 2}, "`rank` is 2 of 2 ranks; they are numbered from 0 to 1"),
        ({"ranks": 3}, "16 sequences a step .* do not divide over 3 ranks; .*: 1, 2, 4, 8, 16"),
    ],
)
def test_a_wrong_start_or_rank_is_one_line(config: TrainSettings, given: dict[str, Any], message: str) -> None:
    with pytest.raises(chimera.UserError, match=message) as error:
        chimera.batches(config, **given)
    assert "\n" not in str(error.value)


def test_a_config_without_shards_is_planned_but_has_no_batches(tmp_path: Path, config: TrainSettings) -> None:
    with_shards = chimera.plan(config)
    config.shards = str(tmp_path / "none")
    assert chimera.plan(config) == with_shards
    assert (with_shards.steps, [segment.end_step for segment in with_shards.segments]) == (30, [8, 16, 20, 30])
    with pytest.raises(chimera.UserError, match=r"no shards at .*none"):
        chimera.batches(config)


def test_shards_are_built_and_verified_and_a_stream_packed_none_keeps_its_shape(
    demo_shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "shards.yaml").write_text(
        f"output: {tmp_path}/shards\ntokenizer: {{path: {demo_shards.parent}/tokenizer}}\nblock_len: 64\nworkers: 1\n"
        f"streams: {{it: {{packing: none, sources: [{{files: ['{ROOT}/samples/it_pairs.jsonl'], column: output}}]}}}}\n"
    )
    manifest = chimera.build_shards(str(tmp_path / "shards.yaml"), ["eval_fraction=0"])
    written = json.loads((tmp_path / "shards/manifest.json").read_bytes())
    assert {**manifest, "sha256": written["sha256"]} == written
    assert chimera.build_shards(tmp_path / "shards.yaml", ["eval_fraction=0"]) == manifest  # it is finished
    with pytest.raises(chimera.UserError, match="setting `block_size`"):
        chimera.build_shards(tmp_path / "shards.yaml", ["block_size=4"])

    one = ["phases=[{name: one, steps: 6, proportions: {it: 1}}]", "curriculum.stages=[{from_step: 0, seq_len: 64}]"]
    config = chimera.read_config(ROOT / "yamls/demo/base.yaml", words(tmp_path / "shards", *one))
    pad = manifest["tokenizer"]["pad_id"]
    for batch in chimera.batches(config):
        assert batch["input_ids"].shape == (16, 64)
        assert bool((batch["labels"][batch["input_ids"] == pad] == -100).all())
    assert any(bool((batch["input_ids"][:, -1] == pad).all()) for batch in chimera.batches(config))  # kept, not cut off

    chimera.verify_shards(tmp_path / "shards")
    shutil.copytree(tmp_path / "shards", tmp_path / "damaged")
    shard = next((tmp_path / "damaged/it/train").glob("shard.*"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(chimera.UserError, match=r"damaged: \d+ problems?: .*the first: it/train/shard") as error:
        chimera.verify_shards(str(tmp_path / "damaged"))
    assert "\n" not in str(error.value)
    with pytest.raises(chimera.UserError, match="no readable manifest"):
        chimera.verify_shards(tmp_path)


def loaded_by(code: str) -> set[str]:
    """The modules that a new process has imported after `code`."""
    code += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_chimera_imports_nothing_heavy() -> None:
    code = "import chimera; assert {*chimera.__all__} <= {*dir(chimera)}; assert not hasattr(chimera, 'nothing')"
    heavy = {"torch", "streaming", "composer", "transformers", "numpy", "omegaconf", "train", "convert"}
    assert not loaded_by(code) & heavy


def test_batches_need_no_composer(demo_shards: Path) -> None:
    code = (
        f"import chimera; config = chimera.read_config('yamls/demo/base.yaml', {words(demo_shards)!r})\n"
        "assert next(iter(chimera.batches(config)))['step'] == 0"
    )
    found = loaded_by(code)
    assert "torch" in found
    assert "composer" not in found


def test_public_names_are_there_and_as_type_checkers_see_them() -> None:
    names: dict[str, Any] = {}
    source = (ROOT / "chimera/__init__.py").read_text()
    exec(source.replace("if TYPE_CHECKING:", "if True:"), names)  # the block that only type checkers read
    for name in chimera.__all__:
        assert getattr(chimera, name) is names[name] or name == "__version__"
