"""`rebuild=true`, and builds that share an output in turn: one build is published, whole, and nothing else."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.convert.build import part_lock, plan
from chimera.convert.build.folder_output import FolderOutput
from chimera.convert.build.part import run_part
from chimera.convert.build.plan import load_plan
from tests.convert import builds


class _Killed(BaseException):
    pass


class _Stopped(builds.Inline):
    """Ends the build before its first part."""

    def wait(self, seconds: float) -> list[Any]:
        raise _Killed


def config(sources: Path, output: Path, streams: str = "columns", **changes: Any) -> dict[str, Any]:
    settings = builds.config(sources, output, **changes)
    return {**settings, "streams": {name: settings["streams"][name] for name in streams.split()}}


def stopped(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, method: str = "", call: int = 0) -> None:
    """A build killed at a call of a method of its output, or once it is planned."""
    if not method:
        with pytest.raises(_Killed):
            builds.build_here(settings, _Stopped)
        return
    real, calls = getattr(FolderOutput, method), 0

    def kill(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > call:
            raise _Killed
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FolderOutput, method, kill)
        with pytest.raises(_Killed):
            builds.build_here(settings)


def wanted(settings: dict[str, Any], folder: Path) -> dict[str, str]:
    """The output of the same build in a folder of its own."""
    builds.build_here({**settings, "output": str(folder / "wanted"), "work": None, "rebuild": False})
    return builds.tree(folder / "wanted")


@pytest.mark.parametrize("again", [True, False])
def test_a_rebuild_killed_while_it_removes_the_old_one_leaves_none_of_it(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    old = config(sources, tmp_path / "out", "columns limited chats")
    builds.build_here(old)
    shutil.copytree(tmp_path / "out", tmp_path / "old")
    new = config(sources, tmp_path / "out", "columns lines", eval_fraction=0.0, rebuild=True)
    tree = wanted(new, tmp_path)
    real, calls, most = Path.unlink, 0, 0

    def unlink(path: Path, missing_ok: bool = False) -> None:
        nonlocal calls
        calls += not {".work", ".claims"} & {*path.parts}
        if calls > most:
            raise _Killed
        real(path, missing_ok)

    kills = 0
    for most in range(0, 100, 3):
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        calls = 0
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink)
            try:
                builds.build_here(new)
                break
            except _Killed:
                kills += 1
        whole = (tmp_path / "out" / "manifest.json").exists()
        assert whole is (most == 0)
        builds.build_here({**new, "rebuild": again or whole})
        assert builds.tree(tmp_path / "out") == tree
    assert kills > 3


def test_a_build_taken_up_after_another_wrote_there_publishes_its_own_alone(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = config(sources, tmp_path / "out", compression=None, eval_fraction=0.0, work=str(tmp_path / "a"))
    other = {**config(sources, tmp_path / "out", "columns chats", compression=None), "work": str(tmp_path / "b")}
    tree = wanted(first, tmp_path)
    for method, call in (("", 0), ("put", 3), ("write", 0)):
        for finished in (True, False):
            for folder in ("out", "a", "b"):
                shutil.rmtree(tmp_path / folder, ignore_errors=True)
            stopped(first, monkeypatch, method, call)
            if finished:
                builds.build_here({**other, "rebuild": True})
                with pytest.raises(UserError, match="was built with other settings"):
                    builds.build_here(first)
            else:
                stopped({**other, "rebuild": True}, monkeypatch, "write", 1)
            if not finished and method:
                with pytest.raises(UserError, match="is missing, or damaged: run the same comm"):
                    builds.build_here(first)
            builds.build_here({**first, "rebuild": True})
            found = builds.tree(tmp_path / "out")
            left = {file for file in found if file.startswith("chats/") or file == "rejects/chats.jsonl.zst"}
            assert {file: value for file, value in found.items() if file not in left} == tree
            assert finished is not bool(left)  # of a build that is unfinished elsewhere nobody knows here


def test_a_worker_that_outlives_its_build_writes_into_no_other(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = config(sources, tmp_path / "out")
    stopped(first, monkeypatch)
    work = tmp_path / "out" / ".work"
    old = load_plan(work)
    second = {**first, "eval_fraction": 0.4, "rebuild": True}
    stopped(second, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(part_lock, "load_plan", lambda _: old)
        with pytest.raises(FileNotFoundError):
            run_part(work, "columns", 0, None, lambda _: None)
    builds.build_here(second)
    assert builds.tree(tmp_path / "out") == wanted(second, tmp_path)


def test_a_published_shard_that_is_lost_is_made_again(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(sources, tmp_path / "out", "columns chats")
    stopped(settings, monkeypatch, "write")
    shards = sorted((tmp_path / "out").glob("*/train/shard.*"))
    shards[0].unlink()
    shards[-1].write_bytes(bytes(shards[-1].stat().st_size))
    refused_once(settings, tmp_path)


def test_a_bit_that_flips_before_a_shard_is_published_is_found(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(sources, tmp_path / "out", "columns chats")
    stopped(settings, monkeypatch, "publish_shard")
    shard = sorted((tmp_path / "out" / ".work").glob("parts-*/*/*/train/shard.*"))[-1]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused_once(settings, tmp_path)


def refused_once(settings: dict[str, Any], tmp_path: Path) -> None:
    """The first start names a shard, the second makes it anew."""
    with pytest.raises(UserError, match=r"train/shard\S+ is missing, or damaged: run the same command again"):
        builds.build_here(settings)
    builds.build_here(settings)
    assert builds.tree(tmp_path / "out") == wanted(settings, tmp_path)


def test_a_finished_output_that_is_damaged_is_replaced_as_verify_says(sources: Path, tmp_path: Path) -> None:
    settings = config(sources, tmp_path / "out", "columns chats")
    builds.build_here(settings)
    tree = builds.tree(tmp_path / "out")
    next((tmp_path / "out" / "columns" / "train").glob("shard.*")).write_bytes(b"torn")
    (tmp_path / "out" / "columns" / "train" / "shard.99999.00000.mds").write_bytes(b"stray")
    (tmp_path / "out" / "manifest.json").unlink()
    with pytest.raises(UserError, match="is not of this build"):
        builds.build_here(settings)
    builds.build_here({**settings, "rebuild": True})
    assert builds.tree(tmp_path / "out") == tree


def test_a_build_begins_anew_without_a_file_that_was_removed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(sources, tmp_path / "in")
    settings = config(tmp_path / "in", tmp_path / "out")
    stopped(settings, monkeypatch)
    (tmp_path / "in" / "1.parquet").unlink()
    with pytest.raises(UserError, match=r"1\.parquet cannot be read .*: fix the file, or remove it and set `rebuild="):
        builds.build_here(settings)
    builds.build_here({**settings, "rebuild": True})
    assert builds.tree(tmp_path / "out") == wanted(settings, tmp_path)


def test_a_stream_behind_a_link_is_replaced_whole(sources: Path, tmp_path: Path) -> None:
    builds.build_here(config(sources, tmp_path / "out"))
    (tmp_path / "out" / "columns").rename(tmp_path / "elsewhere")
    (tmp_path / "out" / "columns").symlink_to(tmp_path / "elsewhere")
    settings = config(sources, tmp_path / "out", eval_fraction=0.0, rebuild=True)
    builds.build_here(settings)
    assert (tmp_path / "out" / "columns").is_symlink()
    assert builds.tree(tmp_path / "out" / "columns") == builds.tree(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / "eval").exists()


@pytest.mark.parametrize("place", ["columns", "columns/notes.txt", "columns/train/thesis.tex", "columns/train/more/a"])
def test_what_no_build_made_is_never_removed(sources: Path, tmp_path: Path, place: str) -> None:
    file = tmp_path / "out" / place
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="was not made by a build: move it away"):
        builds.build_here(config(sources, tmp_path / "out", rebuild=True))
    assert file.read_text() == "mine"


def test_a_work_folder_behind_a_link_is_left_empty(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".work").symlink_to(tmp_path / "scratch")
    builds.build_here(config(sources, tmp_path / "out"))
    assert list((tmp_path / "scratch").iterdir()) == []
    builds.build_here(config(sources, tmp_path / "out"))


@pytest.mark.parametrize("name", ["plan.json", "tokenizer.json", "commits.jsonl"])
def test_damaged_work_is_one_line(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = config(sources, tmp_path / "out")
    stopped(settings, monkeypatch)
    work = tmp_path / "out" / ".work"
    run_part(work, "columns", 0, None, lambda _: None)
    (file,) = work.rglob(name)
    text = file.read_bytes()
    torn = [b"", b"{}", text[: len(text) // 2]]  # at its end a journal may be
    for bad in {"tokenizer.json": [text + b" "], "commits.jsonl": [b"{}" + text, text[1:]]}.get(name, torn):
        file.write_bytes(bad)
        plan._encoder.cache_clear()  # as in another process
        with pytest.raises(UserError, match=f"{name}.* is damaged|{name} is not the tokenizer"):
            builds.build_here(settings)


def test_parts_that_nobody_runs_are_not_taken_for_done(sources: Path, tmp_path: Path) -> None:
    class NoSlots(builds.Inline):
        def __init__(self, work: Path) -> None:
            super().__init__(work, slots=0)

    with pytest.raises(RuntimeError, match="parts of columns were not run"):
        builds.build_here(config(sources, tmp_path / "out"), NoSlots)
    assert not (tmp_path / "out" / "manifest.json").exists()
