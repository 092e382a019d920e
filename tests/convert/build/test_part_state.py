"""The journal of a part: a commit happened or did not, costs the same however long the part, and old ones go on."""

import io
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chimera.cli import UserError
from chimera.convert.build import batches, part_state, shard_writer
from chimera.convert.build import part as part_module
from chimera.convert.build.part import run_part
from chimera.convert.build.part_state import PartState
from chimera.convert.build.plan import load_plan
from tests.convert import builds


def _shard(folder: Path, state: PartState, split: str) -> None:
    """One more shard, on disk and in the state."""
    shards = state.splits[split].shards
    name = f"shard.00000.{len(shards):05d}.mds"
    (folder / split / name).write_bytes(b"x")
    shards.append({"samples": 1, "raw_data": {"basename": name, "bytes": 1, "hashes": {}}, "zip_data": None})


def _next(folder: Path, state: PartState, arrays: Any) -> None:
    """The fourth commit."""
    _shard(folder, state, "train")
    state.number = 4
    part_state.save(folder, state, arrays)


def _begun(folder: Path) -> PartState:
    """A part of three commits."""
    for split in part_state.SPLITS:
        (folder / split).mkdir(parents=True)
    state = PartState()
    part_state.clean(folder, state)
    for number, split in enumerate(("train", "eval", "train"), 1):
        _shard(folder, state, split)
        state.number = number
        part_state.save(folder, state, {"train.blocks": np.arange(number)} if number < 3 else None)
    return state


@pytest.mark.parametrize("arrays", [None, {"train.blocks": np.arange(9)}])
def test_a_commit_that_is_cut_at_any_byte_did_not_happen(tmp_path: Path, arrays: Any) -> None:
    before, whole, killed = tmp_path / "before", tmp_path / "whole", tmp_path / "killed"
    state = _begun(before)
    shutil.copytree(before, whole)
    _next(whole, state, arrays)
    journal = (whole / "commits.jsonl").read_bytes()
    start, found = len((before / "commits.jsonl").read_bytes()), part_state.load(before)
    assert part_state.load(whole) == state
    assert found != state
    shutil.copytree(before, killed)
    for cut in range(start, len(journal)):
        (killed / "commits.jsonl").write_bytes(journal[:cut])
        assert part_state.load(killed) == found
    for cut in range(start, len(journal), 60):
        shutil.rmtree(killed)
        shutil.copytree(before, killed)
        (killed / "commits.jsonl").write_bytes(journal[:cut])
        for name in ("waiting-3.npz", ".waiting-3.npz.tmp", "train/shard.00000.00002.mds"):
            (killed / name).write_bytes(b"torn")
        again = part_state.load(killed)
        part_state.clean(killed, again)
        assert builds.tree(killed) == builds.tree(before)
        assert part_state.load_waiting(killed, again)["train.blocks"].tolist() == [0, 1]
        _next(killed, again, arrays)
        assert again == state
        assert builds.tree(killed) == builds.tree(whole)


def test_a_damaged_journal_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "part"
    state = _begun(folder)
    journal = folder / "commits.jsonl"
    data = journal.read_bytes()
    first = data.index(b"\n") + 1
    for bad in (data.replace(b'"number": 2', b'"number": 7'), data[first:], data[:first] + data, b"\n" + data):
        journal.write_bytes(bad)
        with pytest.raises(UserError, match=r"commits\.jsonl is damaged \(at byte \d+\): remove .* and run"):
            part_state.load(folder)
    journal.write_bytes(data)
    (folder / "state.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"state\.npz is damaged .*: remove .* and run the command again"):
        part_state.load(folder)
    (folder / "waiting-2.npz").unlink()
    with pytest.raises(UserError, match=r"waiting-2\.npz is damaged .*: remove .* and run the command again"):
        part_state.load_waiting(folder, state)


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The work folder of a planned build of one part, and the folder of that part."""
    builds.write_sources(tmp_path / "in")
    stream = {"format": "chatml", "packing": "best_fit", "sources": [{"files": [f"{tmp_path}/in/chats.jsonl"]}]}
    changes = {"part_bytes": 1 << 20, "shard_bytes": 700, "streams": {"s": stream}}

    class Stop(builds.Inline):
        def wait(self, seconds: float) -> list[Any]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        builds.build_here(builds.config(tmp_path / "in", tmp_path / "out", **changes), Stop)
    monkeypatch.setattr(batches, "BATCH_ROWS", 30)
    work = tmp_path / "out" / ".work"
    return work, load_plan(work).streams["s"].part_folder(work, 0)


def test_what_a_commit_writes_does_not_grow_with_the_part(part: tuple[Path, Path]) -> None:
    work, folder = part
    batches: list[Any] = []
    run_part(work, "s", 0, None, batches.append)
    lines = (folder / "commits.jsonl").read_bytes().splitlines()
    state = part_state.load(folder)
    assert len(lines) == 2 + sum(len(split.shards) for split in state.splits.values()) > 60
    assert len({*lines}) == len(lines)
    assert max(map(len, lines[-30:])) < max(map(len, lines[:30])) + 40  # digits of the counters
    assert state.waiting <= 2 * len(batches) + 2  # what waits is written for a batch of a split, not for a shard


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_every_commit_holds_all_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    rng = random.Random(6)
    rows = [{"instruction": "?", "input": "", "output": builds.text(rng, words)} for words in (30, 3000, 9, 1000, 700)]
    (tmp_path / "long.jsonl").write_bytes(builds.jsonl(rows))
    stream = {"format": "chatml", "packing": packing, "sources": [{"files": [f"{tmp_path}/long.jsonl"]}]}
    commits, commit = [0], part_module._Part._commit

    def checked(part: Any) -> None:
        commit(part)
        commits[0] += 1
        found = part_state.load(part.folder)
        assert found == part.state
        stored = part_state.load_waiting(part.folder, found)
        for name, split in part.splits.items():
            mine = {key.removeprefix(f"{name}."): array for key, array in stored.items() if key.startswith(name)}
            again = part._writer(name, stored).arrays()
            part.state.splits[name].passed = found.splits[name].passed
            now = split.packer.state()
            assert {key: array.tolist() for key, array in again.items() if key in now} == {
                key: array.tolist() for key, array in now.items()
            }
            blocks = np.concatenate([np.empty((0, 64), np.uint16), *split.blocks])
            assert again.get("blocks", blocks[:0]).tolist() == blocks.tolist()
            assert len(mine.get("masks", [])) == len(mine.get("blocks", []))

    monkeypatch.setattr(part_module._Part, "_commit", checked)
    monkeypatch.setattr(shard_writer, "SLICE", 128)
    monkeypatch.setattr(batches, "BATCH_ROWS", 2)
    builds.build_here(builds.config(tmp_path, tmp_path / "out", shard_bytes=1200, streams={"long": stream}))
    assert commits[0] > 15


def _as_of_the_version_before(folder: Path) -> None:
    """Keep the state of a part as one file, in the way that builds did before there was a journal."""
    state = part_state.load(folder)
    arrays = part_state.load_waiting(folder, state)
    for name, split in state.splits.items():
        for key in (f"{name}.blocks", f"{name}.masks"):
            if key in arrays:
                arrays[key] = arrays[key][split.passed :]
    new = {"end", "waiting", "passed", "written"}
    values: dict[str, Any] = {key: value for key, value in vars(state).items() if key not in new}
    values["splits"] = {
        name: {key: value for key, value in vars(split).items() if key not in new}
        for name, split in state.splits.items()
    }
    buffer = io.BytesIO()
    entries: dict[str, Any] = {"json": np.frombuffer(json.dumps(values).encode(), dtype=np.uint8), **arrays}
    np.savez(buffer, **entries)
    (folder / "state.npz").write_bytes(buffer.getvalue())
    (folder / "commits.jsonl").unlink()
    (folder / f"waiting-{state.waiting}.npz").unlink()


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("at", ["the state of before", "the first line"])
def test_a_part_that_an_earlier_version_began_goes_on(
    part: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    work, folder = part
    run_part(work, "s", 0, None, lambda _: None)
    shards = {name: digest for name, digest in builds.tree(folder).items() if "shard." in name}
    wanted = part_state.load(folder)
    shutil.rmtree(folder)
    save, left = part_state.save, [7]

    def killed(*arguments: Any) -> None:
        save(*arguments)
        left[0] -= 1
        if left[0] == 0:
            raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(part_state, "save", killed)
        with pytest.raises(_Killed):
            run_part(work, "s", 0, None, lambda _: None)
        assert part_state.load(folder).splits["train"].passed > 0
        _as_of_the_version_before(folder)
        if at == "the first line":  # killed between it and the removal of the old state
            old = (folder / "state.npz").read_bytes()
            left[0] = 1
            with pytest.raises(_Killed):
                run_part(work, "s", 0, None, lambda _: None)
            assert not (folder / "state.npz").exists()
            (folder / "state.npz").write_bytes(old)
    begun = {path: os.stat(path).st_mtime_ns for path in folder.rglob("shard.00000.0000[0-3].*")}
    run_part(work, "s", 0, None, lambda _: None)
    assert {name: digest for name, digest in builds.tree(folder).items() if "shard." in name} == shards
    assert {path: os.stat(path).st_mtime_ns for path in begun} == begun
    found = part_state.load(folder)
    assert found.splits == wanted.splits
    assert found.done
    assert not (folder / "state.npz").exists()
