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
from tests.damaged import make, mutate, outcome, restore, words

ROOT = Path(__file__).resolve().parents[1]
FEW, MANY = 50, 2000  # mutations of a kind of file


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    make(folder := tmp_path_factory.mktemp("damaged"))
    return folder


def tables(given: Sequence[str]) -> int:
    """What `report.py` reads and computes, without its charts, which take a second."""
    found = read_run(Path(given[0]))
    assert len(found.mix()) == 2
    assert found.stages()
    return 0


def training(given: Sequence[str]) -> int:
    """The run once more, in a folder of its own; its results are its steps."""
    shutil.rmtree(folder := Path(given[0]), ignore_errors=True)
    code = train([*given[1:], f"save_folder={folder}"])
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    print([(line["step"], line["loss"], line["digest"]) for line in lines])
    return code or 0


def exported(given: Sequence[str]) -> int:
    """An export, whose results are its files."""
    shutil.rmtree(given[1], ignore_errors=True)
    code = export_hf.main(given)
    print(builds.tree(Path(given[1])))
    return code


def commands(folder: Path, kind: str) -> list[tuple[Any, list[str]]]:
    """Those that read a kind of file."""
    of_shards = [
        (verify_shards.main, [f"{folder}/shards"]),
        (plan.main, [*words(folder), "--json"]),
        (inspect_batch.main, [*words(folder), "step=1", "--json", "--decode"]),
        (build_shards.main, [f"{folder}/shards.yaml"]),
    ]
    of_run = [(tables, [f"{folder}/run"])]
    of_checkpoint = [
        (exported, [f"{folder}/run/ep0-ba2-rank0.pt", f"{folder}/out"]),
        (evaluate.main, [f"{folder}/run/ep0-ba2-rank0.pt", *words(folder), "--json"]),
    ]
    of_training = [(training, [f"{folder}/again", *words(folder)])]
    of_cache = [(inspect_batch.main, [*words(folder), "step=1", "--json", "--decode"])]
    return {
        "shards": of_shards,
        "others'": of_shards,
        "run": of_run,
        "checkpoint": of_checkpoint,
        "training": of_training,
        "cache": of_cache,
    }[kind]


FILES = {
    "shards/manifest.json": "shards",
    "shards/texts/train/index.json": "shards",
    "shards/chats/eval/index.json": "shards",
    "shards/tokenizer/tokenizer.json": "shards",
    "shards/proof/chats.jsonl.zst": "shards",
    "shards/chats/train/shard.00000.00000.mds.zstd": "shards",
    "cache/*/shard*.mds": "cache",
    "run/config.json": "run",
    "run/steps.jsonl": "run",
    "run/metrics.jsonl": "run",
    "run/starts.jsonl": "run",
    "run/ep0-ba2-rank0.pt": "checkpoint",
}
TRAINED = [name for name, kind in FILES.items() if kind == "shards" and "eval" not in name]
OTHERS = ("shards/manifest.json", "others'")  # without its hash, as anybody may write one
KINDS = [OTHERS, *FILES.items(), *((name, "training") for name in TRAINED), ("cache/*/shard*.mds", "training")]


def campaign(folder: Path, name: str, kind: str, count: int, capsys: Any, seed: int = 1) -> dict[str, int]:
    """Mutate a file `count` times, each read by one of its commands in turn; how often each exit code was seen."""
    able, right = commands(folder, kind), {}
    for number, (main, given) in enumerate(able):
        code, right[number], said = outcome(main, given, capsys)
        assert code == 0, said
    file, seen = sorted(folder.glob(name))[0], {"0": 0, "1": 0, "2": 0}
    data, rng = file.read_bytes(), random.Random(f"{name} {kind} {seed}")
    ours = data
    if kind == OTHERS[1]:
        data = json.dumps({key: value for key, value in json.loads(data).items() if key != "sha256"}).encode()
    for turn in range(count):
        number = turn % len(able)
        main, given = able[number]
        if not name.startswith("cache/"):
            shutil.rmtree(folder / "cache", ignore_errors=True)
        way = mutate(rng, file, data)
        changed = file.is_dir() or file.read_bytes() != data
        try:
            code, shown, said = outcome(main, given, capsys)
        except BaseException as error:
            raise AssertionError(f"mutation {turn} of {name} ({way}) through {main.__module__}") from error
        finally:
            restore(file, ours)
        seen[str(code)] += 1
        assert code in (0, 2) or (code == 1 and main is verify_shards.main), said
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        warned = main is plan.main and "warning: training would refuse this: " in said
        assert len(errors) == (code == 2) or (code == 2 and warned), said
        if code == 0 and kind not in ("run", OTHERS[1]):  # which have no hash: a log's lines, and that manifest
            assert shown == right[number], (turn, way)
        if code == 0 and changed and kind == "shards" and main is build_shards.main:
            assert "shard." in name or name.endswith("manifest.json"), (turn, way)  # `verify_shards.py` reads shards
    return seen


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_damaged_file_of_ours_is_one_line_or_does_not_matter(
    made: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign(made, name, kind, FEW if kind != "training" else 5, capsys)


def test_a_checkpoint_counts_by_the_step_it_holds(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(made / "run/ep0-ba1-rank0.pt", renamed := tmp_path / "ep0-ba9-rank0.pt")
    assert choose_start(TrainSettings(save_folder=str(tmp_path), autoresume=True), tmp_path) == Start(1, str(renamed))
    assert f"{renamed} holds step 1, whatever its name says" in capsys.readouterr().err


@pytest.mark.chaos
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_two_thousand_mutations_of_each_file(
    made: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    count = int(os.environ.get("CHIMERA_MUTATIONS", MANY))
    seen = campaign(made, name, kind, count if kind != "training" else count // 10, capsys, seed=2)
    with capsys.disabled():
        print(f"\n{name} ({kind}): {sum(seen.values())} mutations, exit codes {seen}")
