"""What a build says of itself to who asks from elsewhere, while it runs, once it is killed, and when it is done."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.commands import build_shards
from chimera.convert.build.status import STATES, BuildStatus, StatusReader, lines_of
from tests.convert import builds
from tests.convert.s3_server import S3Server

COMMAND = [sys.executable, str(builds.ROOT / "convert" / "build_shards.py")]


def settings_for(sources: Path, output: Path | str, **changes: Any) -> dict[str, Any]:
    settings = builds.config(sources, output, part_bytes=20_000, **changes)
    kept = ("lines", "limited")
    return {**settings, "streams": {name: settings["streams"][name] for name in kept}}


def status(settings: dict[str, Any]) -> BuildStatus:
    return StatusReader(builds.merged(settings)).read()


class Watched(builds.Inline):
    """Keeps what the status was before each part."""

    def __init__(self, work: Path, settings: dict[str, Any], found: list[BuildStatus]) -> None:
        super().__init__(work)
        self.reader, self.found = StatusReader(builds.merged(settings)), found

    def wait(self, seconds: float) -> list[Any]:
        self.found.append(self.reader.read())
        return super().wait(seconds)


def test_every_state_of_a_build_is_told(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "out")
    assert status(settings).state == "none"
    assert not (tmp_path / "out").exists()
    found: list[BuildStatus] = []
    manifest = builds.build_here(settings, lambda work: Watched(work, settings, found))
    assert {each.state for each in found} == {"building"}
    holder = found[0].holder
    assert holder is not None
    assert (holder.host, holder.pid) == (os.uname().nodename, os.getpid())
    for name in ("lines", "limited"):
        parts = [each.streams[name].parts for each in found]
        assert all(part is not None for part in parts)
        assert [part.done for part in parts if part] == sorted(part.done for part in parts if part)
        assert all(part.done + part.running + part.waiting == part.total for part in parts if part)
    last, after = found[-1], status(settings)
    assert last.streams["limited"].parts is not None
    assert (last.streams["limited"].unit, last.streams["limited"].total) == ("tokens", 9000)
    assert last.streams["lines"].unit == "bytes"
    assert last.streams["lines"].rejected == {"unparseable": 1}
    assert (after.state, after.holder) == ("finished", None)
    for name, stream in after.streams.items():
        wanted = manifest["streams"][name]
        assert stream.documents == wanted["train"]["documents"] + wanted["eval"]["documents"]
        assert stream.filtered == wanted["rows"]["filtered"]
    assert f"lines: rejected: {after.streams['lines'].rejected['unparseable']} unparseable" in lines_of(after)
    assert not (tmp_path / "out" / ".work").exists()


def test_a_stream_that_is_new_to_a_finished_output_waits(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "out")
    builds.build_here({**settings, "streams": {"lines": settings["streams"]["lines"]}})
    found = status(settings)
    assert (found.state, [stream.state for stream in found.streams.values()]) == ("none", ["finished", "waiting"])


def test_a_builder_is_seen_from_another_terminal_and_its_death_too(sources: Path, tmp_path: Path) -> None:
    settings = builds.config(sources, tmp_path / "out", workers=1)
    process = builds.start(settings, tmp_path)
    asked = [*COMMAND, str(tmp_path / "shards.yaml"), "--status", "--json"]
    reader = StatusReader(builds.merged(settings))
    while (found := reader.read()).state != "building" or not any(each.documents for each in found.streams.values()):
        assert process.poll() is None, process.communicate()[0]
    assert found.holder is not None
    assert found.holder.pid == process.pid
    process.kill()
    process.communicate()
    told = json.loads(subprocess.run(asked, check=True, capture_output=True).stdout)
    assert (told["state"], told["holder"]["pid"]) == ("stopped", process.pid)
    assert told["streams"]["lines"]["parts"]["running"] == 0
    watcher = subprocess.Popen([*asked, "--watch"], stdout=subprocess.PIPE, text=True)
    code, said = builds.run(settings, tmp_path)
    assert code == 0, said
    lines = [json.loads(line) for line in watcher.communicate(timeout=60)[0].splitlines()]
    assert watcher.returncode == 0
    assert lines[-1]["state"] == "finished"
    assert all(line["state"] in STATES for line in lines)


def test_rate_and_time_left_follow_from_what_moved_since_the_builder_started(sources: Path, tmp_path: Path) -> None:
    settings = settings_for(sources, tmp_path / "out")
    found: list[BuildStatus] = []

    class Later(Watched):
        def wait(self, seconds: float) -> list[Any]:
            then = time.time() - 100  # a start that long ago
            os.utime(self._work / "start.json", (then, then))
            return super().wait(seconds)

    builds.build_here(settings, lambda work: Later(work, settings, found))
    assert found[0].streams["lines"].rate is None
    moved = [each for each in found if each.streams["lines"].rate]
    assert moved
    for each in moved:
        lines = each.streams["lines"]
        assert lines.at is not None
        assert lines.total is not None
        assert lines.rate == pytest.approx(lines.at / 100, rel=0.1)
        assert lines.left == pytest.approx((lines.total - lines.at) / lines.rate)


def test_of_a_store_it_is_told_who_writes_there_and_what_has_arrived(
    sources: Path, tmp_path: Path, s3: S3Server
) -> None:
    assert s3.url
    settings = settings_for(sources, "s3://bucket/told", work=str(tmp_path / "work"))
    elsewhere = {**settings, "work": str(tmp_path / "elsewhere")}
    found: list[BuildStatus] = []
    builds.build_here(settings, lambda work: Watched(work, elsewhere, found))
    assert {each.state for each in found} == {"elsewhere"}
    assert found[-1].claims["lines"]["host"] == os.uname().nodename
    assert {stream.state for stream in found[-1].streams.values()} == {"elsewhere"}
    assert found[0].streams["lines"].shards < found[-1].streams["lines"].shards
    assert (status(elsewhere).state, status(settings).claims) == ("finished", {})
    assert not (tmp_path / "elsewhere").exists()


def test_streams_of_other_builders_of_a_folder_are_shown_with_their_progress(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(sources, tmp_path / "out", only=["lines"])
    found: list[BuildStatus] = []

    class Killed(BaseException):
        pass

    class Stops(Watched):
        def wait(self, seconds: float) -> list[Any]:
            result = super().wait(seconds)
            if len(self.found) > 2:
                raise Killed
            return result

    whole = {**settings, "only": []}
    with pytest.raises(Killed):
        builds.build_here(settings, lambda work: Stops(work, {**settings, "only": ["limited"]}, found))
    assert {each.state for each in found} == {"elsewhere"}
    states = {name: stream.state for name, stream in found[-1].streams.items()}
    assert states == {"limited": "waiting", "lines": "begun"}
    rows = [each.streams["lines"].rows for each in found]
    assert rows == sorted(rows)
    assert rows[-1] > rows[0]
    said = lines_of(found[-1])
    assert f"only=lines is being built, process {os.getpid()} on {os.uname().nodename}" in said
    # the build is gone, and who asks for all streams is told of its work
    after = status(whole)
    assert after.state == "elsewhere"
    assert after.streams["lines"].rows >= rows[-1]
    assert after.others["lines"]["work"] == str(next((tmp_path / "out").glob(".work-*")))
    capsys.readouterr()
    builds.build_here(whole)
    assert "warning: lines begins anew: the unfinished work in" in capsys.readouterr().err


def test_watching_is_for_the_status(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--watch and --json are for --status"):
        build_shards.main([str(tmp_path / "shards.yaml"), "--watch"])
