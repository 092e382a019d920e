"""Sources in an object store: the documents of the same files in a folder, resumed like them, and changes noticed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.convert.read import store_files
from chimera.convert.read.cannot_open import CannotOpen
from chimera.convert.read.store_files import _regex, find_objects
from tests.convert import builds
from tests.convert.read.test_files import body
from tests.convert.s3_server import S3Server


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    store_files._objects.cache_clear()  # another test's server
    with S3Server(tmp_path / "s3") as server:
        for key, value in server.environment.items():
            monkeypatch.setenv(key, value)
        write_sources(tmp_path / "s3" / "bucket" / "raw")
        yield server
    store_files._objects.cache_clear()


def write_sources(folder: Path) -> None:
    builds.write_sources(folder)
    for i, text in enumerate(builds.texts(60, 30)):
        file = folder / "deep" / "er" / f"{i:02d}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for kind in (".arrow", ".csv"):
        (folder / f"more{kind}").write_bytes(body(kind, folder))


def settings(raw: str, output: Path, *names: str) -> dict[str, Any]:
    streams: dict[str, Any] = {
        "columns": {"sources": [{"files": [f"{raw}/*.parquet", f"{raw}/more.arrow"]}]},
        "lines": {"sources": [{"files": [f"{raw}/plain.jsonl", f"{raw}/packed.*", f"{raw}/more.csv"]}]},
        "texts": {"sources": [{"files": [f"{raw}/**/*.txt"]}]},
        "chats": {"format": "chatml", "packing": "best_fit", "sources": [{"files": [f"{raw}/chats.jsonl"]}]},
    }
    return builds.config(
        Path(),
        output,
        part_bytes=80_000,
        shard_bytes=60_000,
        retries=3,
        streams={name: streams[name] for name in names or streams},
    )


def shards(output: Path) -> dict[str, str]:
    return {file: digest for file, digest in builds.tree(output).items() if "/train/" in file or "/eval/" in file}


def test_a_store_gives_the_shards_of_a_folder_for_two_workers_after_stops_and_errors(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = builds.build_here(settings(str(tmp_path / "s3" / "bucket" / "raw"), tmp_path / "local"))
    wanted = shards(tmp_path / "local")
    code, said = builds.run(settings("s3://bucket/raw", tmp_path / "two", "columns", "chats"), tmp_path)
    assert code == 0, said
    found = shards(tmp_path / "two")

    def fail_once() -> None:
        s3.errors = int(not s3.given)

    again = settings("s3://bucket/raw", tmp_path / "again", "lines", "texts")
    manifest, stops = builds.build_with_stops(again, monkeypatch, rows=20, every=8, at_stop=fail_once)
    assert stops > 1
    assert s3.given == 1
    assert {**found, **shards(tmp_path / "again")} == wanted
    for name, stream in manifest["streams"].items():
        assert stream["rows"] == local["streams"][name]["rows"]
    file = manifest["streams"]["lines"]["source"]["describe"]["files"][0]
    assert file["path"] == "s3://bucket/raw/plain.jsonl"
    assert file["bytes"] == (tmp_path / "s3" / "bucket" / "raw" / "plain.jsonl").stat().st_size
    assert file["etag"]


@pytest.mark.usefixtures("s3")
def test_an_object_that_changes_is_noticed_by_size_and_tag(tmp_path: Path) -> None:
    raw = tmp_path / "s3" / "bucket" / "raw"
    build = settings("s3://bucket/raw", tmp_path / "out")
    build["streams"] = {"chats": build["streams"]["chats"]}
    builds.build_here(build)
    builds.build_here(build)  # finished
    data = (raw / "chats.jsonl").read_bytes()
    (raw / "chats.jsonl").write_bytes(data[:-2] + b" }\n" if data.endswith(b"}\n") else b"")
    with pytest.raises(UserError, match=r"was built with other settings \(the size of s3://bucket/raw/chats\.jsonl\)"):
        builds.build_here(build)
    (raw / "chats.jsonl").write_bytes(data.replace(b"a", b"o", 1))
    with pytest.raises(UserError, match=r"was built with other settings \(the size of s3://bucket/raw/chats\.jsonl\)"):
        builds.build_here(build)
    (raw / "chats.jsonl").unlink()
    builds.build_here(build)  # a finished build does not need it


@pytest.mark.usefixtures("s3")
def test_what_is_not_in_a_store_is_said() -> None:
    assert [url for url, _ in find_objects("s3://bucket/raw/*.parquet", 2)] == [
        "s3://bucket/raw/0.parquet",
        "s3://bucket/raw/1.parquet",
    ]
    with pytest.raises(CannotOpen, match=r"no object at s3://bucket/raw/\*\.xml"):
        find_objects("s3://bucket/raw/*.xml", 2)
    with pytest.raises(CannotOpen, match=r"no object at s3://bucket/raw; objects lie below it: give a glob"):
        find_objects("s3://bucket/raw", 2)


@pytest.mark.parametrize(
    ("pattern", "key", "matches"),
    [
        ("raw/*.jsonl", "raw/a.jsonl", True),
        ("raw/*.jsonl", "raw/b/a.jsonl", False),
        ("raw/*.jsonl", "raw/.a.jsonl", False),
        ("raw/**/*.jsonl", "raw/a.jsonl", True),
        ("raw/**/*.jsonl", "raw/b/c/a.jsonl", True),
        ("raw/**/*.jsonl", "raw/.b/a.jsonl", False),
        ("raw/**/*.jsonl", "other/raw/a.jsonl", False),
        ("raw/[ab]-*/x+y.txt", "raw/a-1/x+y.txt", True),
        ("raw/[!ab]*.txt", "raw/a.txt", False),
    ],
)
def test_globs_of_stores_match_as_those_of_folders(tmp_path: Path, pattern: str, key: str, matches: bool) -> None:
    import glob
    import re

    assert (re.fullmatch(_regex(pattern), key) is not None) == matches
    (tmp_path / key).parent.mkdir(parents=True)
    (tmp_path / key).touch()
    assert bool(glob.glob(str(tmp_path / pattern), recursive=True)) == matches
