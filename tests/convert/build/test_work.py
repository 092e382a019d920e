"""The work folder between runs: whose it is, what is removed of it, and what may change before the build goes on."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.convert.build.build import State, look
from chimera.convert.build.executor import LocalExecutor, Task
from chimera.convert.build.outputs import open_output
from chimera.convert.encode.encoding import Encoder
from chimera.convert.settings import BuildSettings, TokenizerSettings
from tests.convert import builds


def settings_for(sources: Path, output: Path, **changes: Any) -> dict[str, Any]:
    settings = builds.config(sources, output, **changes)
    settings["streams"] = {"columns": settings["streams"]["columns"]}
    return settings


def work_of(settings: dict[str, Any]) -> Path:
    tokenizer = TokenizerSettings(**settings["tokenizer"])
    return BuildSettings(output=settings["output"], tokenizer=tokenizer, work=settings.get("work")).work_folder


class _Stop(builds.Inline):
    def wait(self, seconds: float) -> list[Any]:
        raise KeyboardInterrupt


def stopped(settings: dict[str, Any]) -> None:
    """A build that was stopped once it was planned."""
    with pytest.raises(KeyboardInterrupt):
        builds.build_here(settings, _Stop)


def test_a_given_work_folder_keeps_what_the_user_has_there(sources: Path, tmp_path: Path) -> None:
    work = tmp_path / "mine"
    work.mkdir()
    (work / "thesis.tex").write_text("years of work")
    settings = settings_for(sources, tmp_path / "out", work=str(work))
    with pytest.raises(UserError, match="no source opens"):
        builds.build_here({**settings, "streams": {"s": {"sources": [{"files": ["/nowhere.jsonl"]}]}}})
    assert [path.name for path in work.iterdir()] == ["thesis.tex"]
    builds.build_here(settings)
    builds.build_here(settings)
    assert [path.name for path in work.iterdir()] == ["thesis.tex"]


def test_a_build_is_new_resuming_replacing_or_finished(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "out")

    def state(**changes: Any) -> State:
        merged = builds.merged(settings | changes)
        encoder = Encoder.from_settings(merged.tokenizer)
        return look(merged, merged.work_folder, open_output(merged), encoder).state

    assert state() is State.NEW
    stopped(settings)
    assert state(workers=5) is State.RESUMING
    with pytest.raises(UserError, match=r"the unfinished build in .*/out/\.work was .* \(block_len: 64 -> 32\)"):
        state(block_len=32)
    assert state(block_len=32, rebuild=True) is State.REPLACING
    builds.build_here(settings)
    assert state(rebuild=True) is State.FINISHED
    with pytest.raises(UserError, match=r"/out was .* \(block_len: 64 -> 32\)"):
        state(block_len=32)
    assert state(block_len=32, rebuild=True) is State.REPLACING


def test_two_outputs_under_one_work_folder_do_not_mix(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "a", work=str(tmp_path / "work"))
    other = {**settings, "output": str(tmp_path / "b")}
    assert work_of(settings) != work_of(other)
    stopped(settings)
    builds.build_here(other)
    assert (work_of(settings) / "plan.json").exists()
    builds.build_here(settings)
    assert builds.tree(tmp_path / "a") == builds.tree(tmp_path / "b")


def test_an_unfinished_build_goes_on_with_the_running_settings_of_now(sources: Path, tmp_path: Path) -> None:
    stopped(settings_for(sources, tmp_path / "out"))
    os.rename(tmp_path / "out", tmp_path / "moved")
    settings = settings_for(sources, tmp_path / "moved", retries=9)
    stopped(settings)
    running = json.loads((tmp_path / "moved" / ".work" / "plan.json").read_text())["running"]
    assert (running["output"], running["retries"]) == (str(tmp_path / "moved"), 9)
    builds.build_here(settings)
    assert not (tmp_path / "moved" / ".work").exists()


@pytest.mark.parametrize(
    "manifest",
    [
        {"name": "a web app"},
        ["a", "list"],
        {"format": 1, "settings": {"a": 1}, "tokenizer": {"digest": "x"}, "streams": {"../../home": {}}},
    ],
)
def test_a_manifest_of_another_program_is_refused(sources: Path, tmp_path: Path, manifest: Any) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    for rebuild in (False, True):
        with pytest.raises(UserError, match=r"manifest\.json was written by another version"):
            builds.build_here(settings_for(sources, tmp_path / "out", rebuild=rebuild))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]


def test_rebuild_removes_nothing_while_a_file_of_the_users_is_in_the_way(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "out")
    builds.build_here(settings)
    before = builds.tree(tmp_path / "out")
    (tmp_path / "out" / "columns" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"columns/notes\.txt was not made by a build"):
        builds.build_here({**settings, "block_len": 32, "rebuild": True})
    (tmp_path / "out" / "columns" / "notes.txt").unlink()
    assert builds.tree(tmp_path / "out") == before


def test_rebuild_removes_nothing_for_sources_that_do_not_open(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "out")
    builds.build_here(settings)
    before = builds.tree(tmp_path / "out")
    settings["streams"]["columns"] = {"sources": [{"files": [str(tmp_path / "missing.parquet")]}]}
    with pytest.raises(UserError, match=r"streams\.columns: no source opens"):
        builds.build_here({**settings, "rebuild": True})
    assert builds.tree(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["rejects", "tokenizer"])
def test_a_stream_may_not_take_the_name_of_another_folder(sources: Path, tmp_path: Path, name: str) -> None:
    settings = settings_for(sources, tmp_path / "out")
    settings["streams"] = {name: settings["streams"]["columns"]}
    with pytest.raises(UserError, match=f"`streams`: `{name}`: a stream's name"):
        builds.build_here(settings)


def test_an_idle_worker_that_died_does_not_hide_how_the_build_ended(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "out")
    stopped(settings)
    executor = LocalExecutor(1, work_of(settings))
    executor.start(Task("columns", 0, None))
    while not any(event.kind == "done" for event in executor.wait(60)):
        pass
    ((process, _),) = executor._idle
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    executor.close()


@pytest.mark.parametrize("to", ["2>&1 | true", "2>/dev/full", ">&-"])
def test_messages_that_nobody_can_read_end_nothing(tmp_path: Path, to: str) -> None:
    """A build or a run goes on, and is not taken for done where it is not."""
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom pathlib import Path\nfrom chimera.cli import progress, run, say\n"
        "def main(argv):\n"
        "    time.sleep(0.2)\n    say('begun')\n    progress(1, 'B', 'bar').close()\n    say('done')\n"
        f"    Path({str(tmp_path / 'done')!r}).touch()\n"
        "run(main, [])\n"
    )
    command = f"set -o pipefail; PYTHONPATH=. {sys.executable} {script} {to}"
    assert subprocess.run(["bash", "-c", command], cwd=builds.ROOT).returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(("code", "status"), [("print('x' * 10**6)", 0), ("raise BrokenPipeError('of a worker')", 1)])
def test_only_a_closed_stdout_makes_a_broken_pipe_a_good_end(code: str, status: int) -> None:
    main = f"from chimera.cli import run\ndef main(argv):\n    {code}\nrun(main, [])"
    with subprocess.Popen(
        [sys.executable, "-c", main], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=builds.ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if status == 0:
            process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait() == status, said
        assert ("BrokenPipeError" in said) == bool(status)


@pytest.mark.parametrize(
    "closed", ["2>&1 | head -0; exit ${PIPESTATUS[0]}", ">&- 2>&- <&-", ">&-", "2>&-", ">/dev/full"]
)
def test_streams_that_are_closed_or_full_do_not_change_how_a_command_ends(closed: str) -> None:
    write = "import sys; print('told' * 100_000, file=sys.stderr); print('result')"
    main = f"from chimera.cli import run\ndef main(argv):\n    {write}\n    return 3\nrun(main, [])"
    command = f'"{sys.executable}" -c "$0" {closed}'
    found = subprocess.run(["bash", "-c", command, main], cwd=builds.ROOT, capture_output=True, text=True, check=False)
    wanted = {"2>&1": 1, ">/dev/full": 2}.get(closed.split()[0], 3)
    assert (found.returncode, "Traceback" in found.stderr) == (wanted, False), found.stderr


def test_a_locale_without_a_character_ends_nothing() -> None:
    main = "from chimera.cli import run\ndef main(argv):\n    print('perch\\u00e9')\nrun(main, [])"
    found = subprocess.run(
        [sys.executable, "-c", main],
        cwd=builds.ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (found.returncode, found.stdout) == (0, b"perch\\xe9\n"), found.stderr


def test_a_second_builder_with_another_work_folder_is_refused(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "out")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "out")
    other = {**settings, "output": str(link), "work": str(tmp_path / "work"), "block_len": 32}

    class Meanwhile(builds.Inline):
        def start(self, task: Any) -> None:
            with pytest.raises(UserError, match="another builder is writing"):
                builds.build_here(other, _Stop)
            super().start(task)

    assert builds.build_here(settings, Meanwhile)["block_len"] == 64


def test_what_a_build_writes_is_no_source_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rows.jsonl").write_bytes(builds.jsonl({"text": text} for text in builds.texts(1, 50)) + b"{broken\n")
    settings = settings_for(tmp_path, tmp_path / "out")
    settings["streams"] = {"s": {"sources": [{"files": [f"{tmp_path}/**/*.jsonl*"]}]}}
    builds.build_here(settings)
    tree = builds.tree(tmp_path / "out")
    assert "rejects/s.jsonl.zst" in tree
    builds.build_here(settings)
    assert "is finished: nothing to do" in capsys.readouterr().err
    builds.build_here({**settings, "rebuild": True, "shard_bytes": 5000})
    assert builds.tree(tmp_path / "out").keys() >= tree.keys() - {"manifest.json"}


def test_a_file_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "in")
    with open(os.fsencode(tmp_path / "in") + b"/caf\xe9.jsonl", "wb") as file:
        file.write(builds.jsonl([{"text": builds.PROSE}]))
    settings = settings_for(tmp_path, tmp_path / "out")
    settings["streams"] = {"s": {"sources": [{"files": [f"{tmp_path}/in/*.jsonl"]}]}}
    with pytest.raises(UserError, match=r"caf.xe9.jsonl'?: the file's name is not UTF-8: rename it"):
        builds.build_here(settings)


def test_a_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    settings = settings_for(tmp_path, tmp_path / "out")
    settings["streams"] = {"s": {"sources": [{"files": [f"{tmp_path}/a.parquet"]}]}}
    with pytest.raises(UserError, match=r"a\.parquet has more than one column `text`: rename one"):
        builds.build_here(settings)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"output": "~/shards"}, "`output` is '~/shards'; it must be a path as it is"),
        ({"output": "a\0b"}, "must be a path as it is"),
        ({"work": "a\0b"}, "`work` is .* must be a path as it is"),
        ({"work": "~/work"}, "`work` is '~/work'; it must be a path as it is"),
        ({"block_len": 1 << 33}, "must be below 268435456"),
    ],
)
def test_settings_that_no_build_can_have(sources: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        builds.build_here(settings_for(sources, tmp_path / "out") | change)


def test_an_output_that_cannot_be_made_is_one_line(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for output, said in ((tmp_path / "dangling", "File exists"), (tmp_path / ("x" * 300), "File name too long")):
        code, text = builds.run(settings_for(sources, output), tmp_path)
        assert (code, "Traceback" in text, said in text) == (2, False, True), text


@pytest.mark.parametrize(("change", "said"), [(-100, "it ends 22600 bytes before where it did"), (1, "changed while")])
def test_a_file_that_shrinks_or_grows_while_it_is_read_is_refused(tmp_path: Path, change: int, said: str) -> None:
    """Rows that went missing this way were missed by nobody."""
    file = tmp_path / "rows.jsonl"
    line = builds.jsonl([{"text": builds.PROSE}])
    file.write_bytes(line * 300)

    class Meanwhile(builds.Inline):
        def start(self, task: Any) -> None:
            file.write_bytes(line * (300 + change))
            super().start(task)

    settings = settings_for(tmp_path, tmp_path / "out")
    settings["streams"] = {"s": {"sources": [{"files": [str(file)]}]}}
    with pytest.raises(UserError, match=said):
        builds.build_here(settings, Meanwhile)
    with pytest.raises(UserError, match=r"the size of .*rows\.jsonl"):
        builds.build_here(settings)
    file.write_bytes(line * 300)  # cut back: the work done counts
    builds.build_here(settings)
    builds.build_here({**settings, "output": str(tmp_path / "undisturbed")})
    assert builds.tree(tmp_path / "out") == builds.tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("size", [15_000, 30_100])
def test_a_line_that_is_cut_or_grows_while_it_is_read_is_no_row(tmp_path: Path, size: int) -> None:
    """Neither the one that runs through the end of a part, nor the last one, which no newline ends."""
    file = tmp_path / "rows.jsonl"
    whole = builds.jsonl({"text": f"{i} {'word ' * 57}"} for i in range(100))[:30_000].rpartition(b"\n")[0]
    file.write_bytes(whole)

    class Meanwhile(builds.Inline):
        def start(self, task: Any) -> None:
            file.write_bytes(whole.ljust(size)[:size])
            super().start(task)

    settings = settings_for(tmp_path, tmp_path / "out", part_bytes=len(whole) // 2 + 1, shard_bytes=300)
    settings["streams"] = {"s": {"sources": [{"files": [str(file)]}]}}
    with pytest.raises(UserError, match=f"end where it did when the build began and the file had {len(whole)} bytes"):
        builds.build_here(settings, Meanwhile)
    file.write_bytes(whole)
    builds.build_here(settings)
    builds.build_here({**settings, "output": str(tmp_path / "undisturbed")})
    assert builds.tree(tmp_path / "out") == builds.tree(tmp_path / "undisturbed")


def test_what_came_of_a_damaged_file_does_not_count_once_it_is_mended(tmp_path: Path) -> None:
    """A damaged letter shows at the file's end alone, when shards hold it."""
    file = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(builds.jsonl({"text": text} for text in ["A mistake" * 9, *builds.texts(5, 5000)]), 0)
    file.write_bytes(whole.replace(b"mistake", b"mistike", 1))
    settings = settings_for(tmp_path, tmp_path / "out")
    settings["streams"] = {"s": {"sources": [{"files": [str(file)]}]}}
    with pytest.raises(UserError, match=r"rows\.jsonl\.gz cannot be read to its end: CRC"):
        builds.build_here(settings)
    file.write_bytes(whole)
    builds.build_here(settings)
    builds.build_here({**settings, "output": str(tmp_path / "undisturbed")})
    assert builds.tree(tmp_path / "out") == builds.tree(tmp_path / "undisturbed")


def test_unfinished_work_that_is_removed_meanwhile_is_one_line(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "out")
    stopped(settings)
    shutil.rmtree(tmp_path / "out")
    executor = LocalExecutor(1, work_of(settings))
    executor.start(Task("columns", 0, None))
    while not (events := executor.wait(60)):
        pass
    executor.close()
    assert isinstance(events[0].payload, UserError), events
    assert "No such file or directory: fix it and run the same command again" in str(events[0].payload)
