"""A build has the same bytes by each engine, and goes on with the one it was planned with, or with the next."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from chimera.convert.encode.engines import NAMES, VARIABLE
from tests.convert import builds
from tests.convert.build.test_work import stopped, work_of

pytest.importorskip("fastokens", reason="the engine has no wheels here")


def output(folder: Path) -> dict[str, Any]:
    """The hashes of all files of a build, of its manifest what it says beside the encoder and the time."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    for stream in manifest["streams"].values():
        del stream["encoder"]
    return {**builds.tree(folder), "manifest.json": manifest}


def encoders(folder: Path) -> set[str]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {stream["encoder"]["path"] for stream in manifest["streams"].values()}


def test_a_build_has_the_same_bytes_by_each_engine(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        monkeypatch.setenv(VARIABLE, name)
        builds.build_here(builds.config(sources, tmp_path / name))
        assert encoders(tmp_path / name) == {name}
        assert output(tmp_path / name) == output(tmp_path / NAMES[0])


def test_a_build_begun_with_another_engine_goes_on_with_it(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = builds.config(sources, tmp_path / "out")
    monkeypatch.setenv(VARIABLE, "tiktoken")
    stopped(settings)
    monkeypatch.delenv(VARIABLE)
    builds.build_here(settings)
    builds.build_here({**settings, "output": str(tmp_path / "whole")})
    assert (encoders(tmp_path / "out"), encoders(tmp_path / "whole")) == ({"tiktoken"}, {"fastokens"})
    assert output(tmp_path / "out") == output(tmp_path / "whole")


def test_a_worker_without_the_planned_engine_takes_the_next_and_says_so(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = builds.config(sources, tmp_path / "out")
    stopped(settings)
    plan = json.loads((work_of(settings) / "plan.json").read_text())
    assert {stream["encoder"]["path"] for stream in plan["streams"].values()} == {"fastokens"}
    builds.build_here({**settings, "output": str(tmp_path / "whole")})
    for name in [name for name in sys.modules if name.split(".")[0] == "fastokens"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastokens", None)
    capsys.readouterr()
    builds.build_here(settings)
    said = "planned with the encoder fastokens, encoding by tiktoken, to the same ids (same merges and pre-tokens; "
    assert said + "fastokens: not installed)" in capsys.readouterr().err
    assert output(tmp_path / "out") == output(tmp_path / "whole")
