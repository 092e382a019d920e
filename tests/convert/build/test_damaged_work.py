"""The files of a work folder, damaged in any way, under a build that goes on: the right bytes, or one line."""

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chimera.convert.build import batches, plan
from chimera.convert.build import build as build_module
from chimera.convert.build import part as part_module
from tests.convert import builds
from tests.damaged import mutate, outcome

FEW, MANY = 50, 2000  # mutations of a kind of file
PART, HELD_OUT = "parts-*/talks/00000", "parts-*/talks.eval_sources/00000"
MIDWAY = ["plan.json", "tokenizer.json", "proof-talks.jsonl.zst", "held-out-talks.npy"]
MIDWAY += [f"{PART}/{name}" for name in ("commits.jsonl", "waiting-*.npz", "rejects.jsonl", "train/shard*")]
DONE = ["plan.json", "tokenizer.json", "proof-talks.jsonl.zst", f"{HELD_OUT}/eval/shard*"]
DONE += [f"{PART}/{name}" for name in ("commits.jsonl", "rejects.jsonl", "train/shard*")]
KINDS = [*(("midway", name) for name in MIDWAY), *(("done", name) for name in DONE)]


class Stopped(BaseException):
    """Stands for a kill: nothing in the builder catches it."""


def config(folder: Path) -> dict[str, Any]:
    """Conversations of which some are rejected, with a validation set of their own, in `folder/out`."""
    sources = {"sources": [{"files": ["talks.jsonl"]}], "eval_sources": [{"files": ["held.jsonl"]}]}
    stream = {"format": "chatml", "packing": "concat", "eval_overlap": "remove", **sources}
    return builds.config(folder, folder / "out", shard_bytes=2000, workers=1, streams={"talks": stream})


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """A build stopped midway, and one stopped before it publishes: folder and, as `wanted`, what it ends with."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHIMERA_ENCODER", "tokenizers")  # no comparison of engines
        patch.setattr(batches, "BATCH_ROWS", 10)
        patch.setattr(os, "fsync", lambda _: None)  # no power is cut here, and it is half of the time
        patch.chdir(folder)
        held = builds.chats(4, 20)
        rows = builds.jsonl(held[:5]) + b"broken\n" * 3 + builds.jsonl(builds.chats(3, 60))
        (folder / "talks.jsonl").write_bytes(rows)
        (folder / "held.jsonl").write_bytes(builds.jsonl(held))
        builds.build_here(config(folder))
        found: dict[str, Any] = {"wanted": builds.tree(folder / "out")}
        shutil.rmtree(folder / "out")
        add, calls = part_module._Part._add, [0]

        def stop_midway(part: Any, *given: Any) -> Any:
            moved, calls[0] = add(part, *given), calls[0] + 1
            if calls[0] == 3:
                part._commit()
                raise Stopped
            return moved

        def stop(*_: Any) -> None:
            raise Stopped

        for name, (place, key, change) in {
            "midway": (part_module._Part, "_add", stop_midway),
            "done": (build_module, "publish", stop),
        }.items():
            with pytest.MonkeyPatch.context() as inner:
                inner.setattr(place, key, change)
                with pytest.raises(Stopped):
                    builds.build_here(config(folder))
            shutil.copytree(folder / "out", folder / name)
            found[name] = folder / name
            shutil.rmtree(folder / "out")
        yield found


def campaign(states: dict[str, Any], state: str, name: str, count: int, capsys: Any) -> dict[str, int]:
    """Mutate a file of an unfinished build `count` times, and run its command; how often each exit code was seen."""
    rng, seen = random.Random(f"{state} {name}"), {"0": 0, "2": 0}
    folder = states[state].parent
    settings, output = config(folder), folder / "out"
    for turn in range(count):
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(states[state], output)
        file = sorted((output / ".work").glob(name))[0]
        kind = mutate(rng, file, file.read_bytes())
        plan._encoder.cache_clear()  # as in another process
        try:
            code, _, said = outcome(lambda _: builds.build_here(settings) and 0, [], capsys)
        except BaseException as error:
            raise AssertionError(f"mutation {turn} of {file} ({kind})") from error
        seen[str(code)] += 1
        if code == 0:
            assert builds.tree(output) == states["wanted"], (turn, kind)
        else:
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1, said
            assert not (output / "manifest.json").exists()
    return seen


@pytest.mark.parametrize(("state", "name"), KINDS)
def test_damaged_work_ends_in_the_right_bytes_or_in_one_line(
    states: dict[str, Any], state: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    campaign(states, state, name, FEW, capsys)


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("state", "name"), KINDS)
def test_chaos_two_thousand_mutations_of_each_file_of_a_work_folder(
    states: dict[str, Any], state: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    count = int(os.environ.get("CHIMERA_MUTATIONS", MANY))
    seen = campaign(states, state, name, count, capsys)
    with capsys.disabled():
        print(f"\n{state} {name}: {sum(seen.values())} mutations, exit codes {seen}")
