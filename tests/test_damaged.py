"""Our own files, damaged in any way, through every command that reads them: right results, or one line."""

import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from chimera.commands import build_shards, evaluate, export_hf, inspect_batch, plan, verify_shards
from chimera.commands.train import main as train
from chimera.train.history.run_files import read_run
from chimera.train.run.start import Start, choose_start
from chimera.train.settings import TrainSettings
from tests.convert import builds
from tests.damaged import mutate, outcome, restore

ROOT = Path(__file__).resolve().parents[1]
FEW, MANY = 50, 2000  # mutations of a kind of file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished build of texts and chats, and a run of two steps on it."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "texts.jsonl").write_bytes(builds.jsonl({"text": text} for text in builds.texts(1, 60)))
    (folder / "chats.jsonl").write_bytes(builds.jsonl(builds.chats(2, 30)))
    streams: dict[str, Any] = {"texts": {"sources": [{"files": [f"{folder}/texts.jsonl"]}]}}
    streams["chats"] = {"format": "chatml", "packing": "best_fit", "sources": [{"files": [f"{folder}/chats.jsonl"]}]}
    settings = builds.config(folder, folder / "shards", streams=streams, compression="zstd", workers=1)
    (folder / "shards.yaml").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHIMERA_ENCODER", "tokenizers")  # no comparison of engines
        builds.build_here(settings)
    assert train(words(folder)) == 0
    return folder


def words(folder: Path, *more: str) -> list[str]:
    return [
        str(ROOT / "yamls/demo/base.yaml"),
        "phases=[{name: all, steps: 2, proportions: {texts: 0.5, chats: 0.5}}]",
        "curriculum.stages=[{from_step: 0, seq_len: 64}]",
        "model={hidden_size: 16, intermediate_size: 16, num_attention_heads: 2, num_hidden_layers: 1}",
        "generate.interval=0",
        *("eval={interval: 2, blocks: 4}", "save_interval=1", "global_train_batch_size=2", "max_passes=1000"),
        *(f"shards={folder}/shards", f"cache={folder}/cache", f"save_folder={folder}/run"),
        "scheduler={name: constant, warmup_steps: 0, decay_steps: 0}",
        *more,
    ]


def tables(given: Sequence[str]) -> int:
    """What `report.py` reads and computes, without its charts, which take a second."""
    found = read_run(Path(given[0]))
    assert len(found.mix()) == 2
    assert found.stages()
    return 0


def commands(folder: Path, kind: str) -> list[tuple[Any, list[str]]]:
    """Those that read a kind of file."""
    of_shards = [
        (verify_shards.main, [f"{folder}/shards"]),
        (plan.main, [*words(folder), "--json"]),
        (inspect_batch.main, [*words(folder), "step=1", "--json"]),
        (build_shards.main, [f"{folder}/shards.yaml"]),
    ]
    of_run = [(tables, [f"{folder}/run"])]
    of_checkpoint = [
        (export_hf.main, [f"{folder}/run/ep0-ba2-rank0.pt", f"{folder}/out"]),
        (evaluate.main, [f"{folder}/run/ep0-ba2-rank0.pt", *words(folder), "--json"]),
    ]
    return {"shards": of_shards, "run": of_run, "checkpoint": of_checkpoint}[kind]


FILES = {
    "shards/manifest.json": "shards",
    "shards/texts/train/index.json": "shards",
    "shards/chats/eval/index.json": "shards",
    "shards/tokenizer/tokenizer.json": "shards",
    "shards/proof/chats.jsonl.zst": "shards",
    "shards/chats/train/shard.00000.00000.mds.zstd": "shards",
    "run/config.json": "run",
    "run/steps.jsonl": "run",
    "run/metrics.jsonl": "run",
    "run/starts.jsonl": "run",
    "run/ep0-ba2-rank0.pt": "checkpoint",
}


def campaign(folder: Path, name: str, count: int, capsys: Any, seed: int = 1) -> dict[str, int]:
    """Mutate a file `count` times, each read by one of its commands in turn; how often each exit code was seen."""
    file, seen = folder / name, {"0": 0, "1": 0, "2": 0}
    data, rng = file.read_bytes(), random.Random(f"{name} {seed}")
    able = commands(folder, FILES[name])
    right = {}
    for number, (main, given) in enumerate(able):
        code, right[number], said = outcome(main, given, capsys)
        assert code == 0, said
        shutil.rmtree(folder / "out", ignore_errors=True)
    for turn in range(count):
        number = turn % len(able)
        main, given = able[number]
        kind = mutate(rng, file, data)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        try:
            code, shown, said = outcome(main, given, capsys)
        except BaseException as error:
            raise AssertionError(f"mutation {turn} of {name} ({kind}) through {main.__module__}") from error
        finally:
            restore(file, data)
            shutil.rmtree(folder / "out", ignore_errors=True)
        seen[str(code)] += 1
        assert code in (0, 2) or (code == 1 and main is verify_shards.main), said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        warned = main is plan.main and "warning: training would refuse this: " in said
        assert len(errors) == (code == 2) or (code == 2 and warned), said
        if code == 0 and name.endswith((".zstd", ".zst", "index.json")) and main is not build_shards.main:
            assert shown == right[number], (turn, kind)
    return seen


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_of_ours_is_one_line_or_does_not_matter(
    made: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign(made, name, FEW, capsys)


def test_a_checkpoint_counts_by_the_step_it_holds(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(made / "run/ep0-ba1-rank0.pt", renamed := tmp_path / "ep0-ba9-rank0.pt")
    assert choose_start(TrainSettings(save_folder=str(tmp_path), autoresume=True), tmp_path) == Start(1, str(renamed))
    assert f"{renamed} holds step 1, whatever its name says" in capsys.readouterr().err


@pytest.mark.chaos
@pytest.mark.parametrize("name", FILES)
def test_two_thousand_mutations_of_each_file(made: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    seen = campaign(made, name, int(os.environ.get("CHIMERA_MUTATIONS", MANY)), capsys, seed=2)
    with capsys.disabled():
        print(f"{name}: {sum(seen.values())} mutations, exit codes {seen}")
