"""A finished output that takes a stream more: the others stay, and a kill leaves the old root or the new."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.commands.verify_shards import verify_shards
from chimera.convert.build.folder_output import FolderOutput
from chimera.manifest import parse_manifest
from tests.convert import builds


def config(sources: Path, output: Path, *streams: str, **changes: Any) -> dict[str, Any]:
    found = builds.config(sources, output, **changes)
    found["streams"] = {name: found["streams"][name] for name in streams}
    return found


def inodes(output: Path, *streams: str) -> dict[Path, tuple[int, int]]:
    paths = [path for name in streams for path in (output / name).rglob("*") if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


@pytest.fixture(scope="module")
def whole(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All streams, built at once."""
    output = tmp_path_factory.mktemp("whole") / "out"
    builds.build_here(config(sources, output, "lines", "limited", "chats"))
    return builds.tree(output)


def test_streams_are_built_beside_those_that_are_there(sources: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    output = tmp_path / "out"
    builds.build_here(config(sources, output, "chats"))  # of which no text begins with anything
    before = inodes(output, "chats")
    builds.build_here(config(sources, output, "chats", "lines"))
    assert inodes(output, "chats") == before
    manifest = builds.build_here(config(sources, output, "lines", "limited", "chats"))
    assert inodes(output, "chats") == before
    assert {*manifest["streams"]} == {"lines", "limited", "chats"}
    assert builds.tree(output) == whole
    assert builds.build_here(config(sources, output, "lines", "limited", "chats")) == manifest


def test_a_stream_that_the_config_names_no_more_is_kept_until_rebuild_is_said(
    sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    builds.build_here(config(sources, output, "lines", "chats"))
    both = builds.tree(output)
    manifest = builds.build_here(config(sources, output, "lines"))
    assert (
        "also holds chats, which the config does not name: kept; `rebuild=true` removes it" in capsys.readouterr().err
    )
    assert ({*manifest["streams"]}, builds.tree(output)) == ({"lines", "chats"}, both)
    before = inodes(output, "lines")
    builds.build_here(config(sources, output, "lines", rebuild=True))
    assert inodes(output, "lines") == before
    builds.build_here(config(sources, tmp_path / "alone", "lines"))
    assert builds.tree(output) == builds.tree(tmp_path / "alone")


def test_one_goes_and_one_comes(sources: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    builds.build_here(config(sources, output, "lines", "chats"))
    builds.build_here(config(sources, output, "lines", "limited", rebuild=True))
    builds.build_here(config(sources, tmp_path / "other", "lines", "limited"))
    assert builds.tree(output) == builds.tree(tmp_path / "other")


def test_a_stream_that_is_there_with_other_settings_is_refused(sources: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    builds.build_here(config(sources, output, "lines"))
    other = config(sources, output, "lines", "limited")
    other["streams"]["lines"]["min_chars"] = 0
    with pytest.raises(UserError, match=r"other settings \(streams.lines.min_chars: 50 -> 0\)"):
        builds.build_here(other)
    with pytest.raises(UserError, match=r"other settings \(eval_fraction: .* -> 0.0\)"):
        builds.build_here(config(sources, output, "limited", eval_fraction=0.0))
    more = config(sources, output, "lines")
    more["streams"]["lines"]["sources"][0]["files"] *= 2
    with pytest.raises(UserError, match=r"lines\.sources\.0\.files: .*added can be a stream of their own"):
        builds.build_here(more)


class Stopped(BaseException):
    """Stands for a kill: nothing in the builder catches it."""


def stop_at(number: int) -> Callable[[], None]:
    """Stop after the `number`-th change of the output; returns what lets it go on."""
    calls = 0
    with_stops = pytest.MonkeyPatch()
    for name in ("write", "update", "put", "publish_shard", "clear", "remove_stale"):
        real = getattr(FolderOutput, name)

        def act(self: Any, *given: Any, real: Any = real, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            mine = calls == number  # others may follow inside of it
            result = real(self, *given, **named)
            if mine:
                raise Stopped
            return result

        with_stops.setattr(FolderOutput, name, act)
    return with_stops.undo


@pytest.mark.parametrize("way", ["grow", "remove"])
def test_a_stop_at_any_change_of_the_output_leaves_the_old_root_or_the_new(
    sources: Path, tmp_path: Path, way: str
) -> None:
    output = tmp_path / "out"
    few, more = config(sources, output, "chats"), config(sources, output, "chats", "limited")
    first, then = (few, more) if way == "grow" else (more, {**few, "rebuild": True})
    names = {"grow": ({"chats"}, {"chats", "limited"}), "remove": ({"chats", "limited"}, {"chats"})}[way]
    builds.build_here(first)
    seen, number = set(), 0
    while number < 100:
        number += 1
        undo = stop_at(number)
        try:
            builds.build_here(then)
            break
        except Stopped:
            held = frozenset(parse_manifest((output / "manifest.json").read_bytes()).streams)
            assert held in names
            seen.add(held)
            if number % 5 == 3:
                verify_shards(output)
        finally:
            undo()
    assert number > (5 if way == "grow" else 1)
    assert seen == {frozenset(each) for each in (names if way == "grow" else names[1:])}
    verify_shards(output)
    builds.build_here(config(sources, tmp_path / "other", *sorted(names[1])))
    assert builds.tree(output) == builds.tree(tmp_path / "other")
