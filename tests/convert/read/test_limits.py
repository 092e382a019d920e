"""Bounds: a full disk, memory under what a library must hold at once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from chimera.cli import UserError
from tests.convert import builds

GIB = 1 << 30


def test_a_full_disk_is_one_clear_line_and_the_build_goes_on_when_there_is_room(tmp_path: Path) -> None:
    """On a real file system of 300 kB, mounted in a namespace of its own."""
    builds.write_sources(tmp_path / "in")
    disk, path = tmp_path / "disk", tmp_path / "shards.yaml"
    disk.mkdir()
    path.write_text(json.dumps(builds.config(tmp_path / "in", disk / "out", compression=None)))
    build = f"{sys.executable} {builds.ROOT}/convert/build_shards.py {path}"
    script = (
        f"mount -t tmpfs -o size=300k tmpfs {disk} || exit 77; {build}; echo code=$?; "
        f"mount -o remount,size=50m {disk}; {build}; echo code=$?; cp -r {disk}/out {tmp_path}/copy"
    )
    found = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    if found.returncode == 77 or "unshare" in found.stderr:
        pytest.skip("no user namespaces with mounts here")
    assert found.stdout.split() == ["code=2", "code=0"], found.stderr
    assert f"error: no space left for {disk}/out/.work" in found.stderr
    assert "Traceback" not in found.stderr
    builds.build_here(builds.config(tmp_path / "in", tmp_path / "roomy", compression=None))
    assert builds.tree(tmp_path / "copy") == builds.tree(tmp_path / "roomy")


@pytest.mark.parametrize(
    ("limit", "said"),
    [("-n 40", "error: too many open files: raise `ulimit -n` or lower `workers`"), ("-f 8", ": File too large: fix")],
)
def test_a_limit_of_the_system_is_one_clear_line(tmp_path: Path, limit: str, said: str) -> None:
    builds.write_sources(tmp_path / "in")
    path = tmp_path / "shards.yaml"
    path.write_text(json.dumps(builds.config(tmp_path / "in", tmp_path / "out", workers=30, part_bytes=2000)))
    script = f"ulimit {limit}; exec {sys.executable} {builds.ROOT}/convert/build_shards.py {path}"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    assert said in found.stderr
    assert "Traceback" not in found.stderr


MIXED = "perché la città è più bella, 東京 non lo è. " * 2_000_000 + "😀"
WIDE = "Why does the river bend where the hill is soft? " * 2_090_000 + "😀"  # 4 bytes a character in Python


def test_a_line_of_100_mb_takes_less_than_a_gigabyte(tmp_path: Path) -> None:
    """With a character that Python widens all others for, each byte an id of 4 bytes, and a mask."""
    spec = json.loads((builds.tokenizer() / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    spec["model"].update(merges=[], vocab=vocabulary | {f"unused {i}": i for i in range(len(vocabulary), 70_000)})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    rows = [{"instruction": "Say it.", "output": text} for text in (builds.PROSE, MIXED, builds.PROSE)]
    (tmp_path / "in.jsonl").write_bytes(builds.jsonl(rows))
    settings = builds.config(
        tmp_path, tmp_path / "out", block_len=1024, shard_bytes=32 << 20, part_bytes=64 << 20, workers=1
    )
    settings["tokenizer"]["path"] = str(tmp_path)
    settings["streams"] = {"s": {"format": "chatml", "sources": [{"files": [f"{tmp_path}/in.jsonl"]}]}}
    assert peak(settings, tmp_path) < 10**9
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]
    assert manifest["rows"]["documents"] == 3
    assert manifest["train"]["tokens"] > 100e6


def peak(settings: dict[str, Any], folder: Path, **environment: str) -> int:
    """Bytes a build takes: of the builder and its worker, whichever took more."""
    (folder / "shards.yaml").write_text(json.dumps(settings))
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, f"{builds.ROOT}/convert/build_shards.py", str(folder / "shards.yaml")]
    found = subprocess.run(
        [sys.executable, "-c", measure, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert found.returncode == 0, found.stderr
    return int(found.stdout) * 1024


@pytest.mark.parametrize(
    "kind", ["one line of 100 MB", "lines of 1 MB", pytest.param("equal values of 1 MB", marks=pytest.mark.chaos)]
)
def test_rejected_rows_of_any_size_take_less_than_a_gibibyte(tmp_path: Path, kind: str) -> None:
    good, mega = {"text": builds.PROSE}, "perché no? \0" * 80_000
    if kind == "equal values of 1 MB":  # which parquet stores once
        import pyarrow as pa
        import pyarrow.parquet as pq

        file = tmp_path / "in.parquet"
        pq.write_table(pa.table({"text": [builds.PROSE] + [mega] * 700}), file, row_group_size=2000)
        rejected = {"nul": 700}
    else:
        file = tmp_path / "in.jsonl"
        count, line = (1, b"\x01\xff" * 50_000_000) if kind == "one line of 100 MB" else (1000, b"{" + b"x" * 1_000_000)
        with open(file, "wb") as out:
            out.write(builds.jsonl([good]))
            out.writelines(line + b"\n" for _ in range(count))
        rejected = {"invalid_utf8" if count == 1 else "unparseable": count}
    settings = builds.config(tmp_path, tmp_path / "out", part_bytes=2 << 30, workers=1, eval_fraction=0)
    settings["streams"] = {"s": {"sources": [{"files": [str(file)]}]}}
    assert peak(settings, tmp_path) < 0.6 * GIB
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["rows"]
    assert (rows["documents"], rows["rejected"]) == (1, rejected)
    with zstandard.open(tmp_path / "out" / "rejects" / "s.jsonl.zst", "rt") as lines:
        first = json.loads(next(iter(lines)))
    assert len(first["raw"]) <= 1 << 20
    if kind == "one line of 100 MB":
        assert first["raw_length"] == 100_000_000


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_row_of_millions_of_values_takes_less_than_a_gigabyte(tmp_path: Path, kind: str) -> None:
    """As objects of Python they would take several."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    said = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
    file = tmp_path / f"in.{kind}"
    if kind == "jsonl":
        many = b'{"messages": [' + json.dumps(said)[1:-1].encode() + b', {"role": []}' * 4_000_000 + b"]}\n"
        file.write_bytes(many + builds.jsonl([{"messages": said}] * 20))
    else:
        column = pa.array(["a"]).take(pa.array([0] * 7_000_000))
        messages = pa.StructArray.from_arrays([column, column], ["role", "content"])
        lists = pa.concat_arrays([pa.ListArray.from_arrays([0, len(messages)], messages), pa.array([said] * 20)])
        pq.write_table(pa.table({"messages": lists}), file)
    settings = builds.config(tmp_path, tmp_path / "out", workers=1)
    settings["streams"] = {"s": {"format": "chatml", "min_tokens": 1, "sources": [{"files": [str(file)]}]}}
    assert peak(settings, tmp_path) < 10**9
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["rows"]
    assert (rows["documents"], rows["rejected"]) == (20, {"too_many_values": 1})


def reading(file: Path, memory: int) -> tuple[str, int]:
    """What a process of its own says to the bytes of text in a file, and how much memory it took.

    Without the pages of files that are mapped into it, its libraries above all: how many of them are there is the
    system's affair.
    """
    read = (
        "import re, sys; from chimera.limits import Limits\n"
        "from chimera.convert.read.readers import rows_of_file\n"
        "from chimera.convert.read.reading import Position, Span; from chimera.cli import run\n"
        f"rows = rows_of_file(Span('file', '{file}', 0, None, 0), 'text', Position(), Limits({memory}))\n"
        "def main(_):\n"
        "    print(sum(len(row.value['text']) for row in rows))\n"
        "try:\n    run(main, [])\n"
        "finally:\n    status = dict(re.findall(r'(\\w+):\\s*(\\d+) kB', open('/proc/self/status').read()))\n"
        "    print(int(status['VmHWM']) - int(status['RssFile']))"
    )
    done = subprocess.run([sys.executable, "-c", read], cwd=builds.ROOT, capture_output=True, text=True, check=False)
    *said, kibibytes = (done.stderr + done.stdout).strip().splitlines()
    return "".join(said), int(kibibytes) * 1024


@pytest.fixture(scope="module")
def books() -> Any:
    """A set of books: Arrow's writer puts a thousand rows into one page, whatever they hold."""
    import pyarrow as pa

    return pa.table({"text": [os.urandom(50_000).hex() + "a" * 100_000 for _ in range(500)]})


def test_a_page_of_books_takes_twice_its_bytes_or_is_refused(tmp_path: Path, books: Any) -> None:
    import pyarrow.parquet as pq

    file = tmp_path / "books.parquet"
    pq.write_table(books, file)
    said, took = reading(file, 600 << 20)
    assert said == "100000000"
    assert took < 100e6 + 2 * 100e6
    said, took = reading(file, 200 << 20)
    assert said == (
        f"error: {file}: row group 0 (95 MiB of text) takes more memory than the 200 MiB that a worker may "
        "(`worker_memory`): raise that, run fewer `workers`, or write the file again with smaller row groups or pages"
    )
    assert took < 200 << 20


def test_a_row_group_of_books_in_small_pages_takes_the_memory_of_a_page(tmp_path: Path, books: Any) -> None:
    import pyarrow.parquet as pq

    pq.write_table(books, tmp_path / "books.parquet", use_dictionary=False, write_batch_size=1)
    said, took = reading(tmp_path / "books.parquet", 120 << 20)
    assert said == "100000000"
    assert took < 120 << 20


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_of_a_large_arrow_batch_only_what_is_compressed_counts(
    tmp_path: Path, books: Any, compression: str | None
) -> None:
    import pyarrow as pa

    file = tmp_path / "books.arrow"
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(str(file), books.schema, options=options) as writer:
        writer.write_table(books)
    said, took = reading(file, 100 << 20)
    if compression is None:
        assert said == "100000000"
        assert took < 100 << 20
    else:
        assert said.startswith(f"error: {file}: a compressed record batch takes more memory than the 100 MiB that a")
        assert took < 150 << 20
        assert reading(file, 400 << 20)[0] == "100000000"


def test_equal_values_of_a_dictionary_are_held_a_few_at_a_time(tmp_path: Path) -> None:
    """Of which the footer counts one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["short"] * 1000 + ["a" * 20_000_000] * 20}), tmp_path / "a.parquet")
    said, took = reading(tmp_path / "a.parquet", 250 << 20)
    assert said == str(5 * 1000 + 20 * 20_000_000)
    assert took < 300 << 20


def test_a_line_too_long_for_a_worker_is_refused_not_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(builds.jsonl([{"text": "short"}, {"text": "a" * 30_000_000}]))
    said, _ = reading(tmp_path / "a.jsonl", 350 << 20)
    assert said.startswith(
        f"error: {tmp_path}/a.jsonl: the line at byte 18 (28 MiB) takes more memory than the 350 MiB that a worker"
    )


def test_the_default_is_a_workers_share_of_what_is_free() -> None:
    from chimera.convert.settings import BuildSettings
    from chimera.limits import available_memory

    free = available_memory()
    assert 1 << 28 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert BuildSettings(workers=4).limits().memory == pytest.approx(free / 4, rel=0.2)
    assert BuildSettings(workers=10**6).limits().memory == 512 << 20
    assert BuildSettings(workers=4, worker_memory="2gb").limits().memory == 2 << 30
    with pytest.raises(UserError, match="`worker_memory` is '100mb'; it must be at least 512mb"):
        builds.build_here(builds.config(Path("in"), "out", worker_memory="100mb"))
    with pytest.raises(UserError, match="setting `worker_memory` is 'much': write bytes"):
        builds.build_here(builds.config(Path("in"), "out", worker_memory="much"))


def test_a_build_refused_for_its_memory_goes_on_with_more(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    texts = pa.concat_arrays([pa.array(["river " * 200_000] * 2), pa.array(["a" * 1_000_000] * 480)])
    with pq.ParquetWriter(file, pa.schema([("text", pa.string())]), use_dictionary=False) as writer:
        for begin, count in ((0, 2), (2, 480)):
            writer.write_table(pa.table({"text": texts.slice(begin, count)}))
    settings = builds.config(tmp_path, tmp_path / "out", part_bytes=1 << 30)
    settings["streams"] = {"s": {"min_chars": 1_100_000, "sources": [{"files": [str(file)]}]}}
    code, said = builds.run({**settings, "worker_memory": "512mb"}, tmp_path)
    assert code == 2
    assert f"error: {file}: row group 1 (457 MiB of text) takes more memory than the 512 MiB that a worker may" in said
    code, said = builds.run({**settings, "worker_memory": "1gb"}, tmp_path)
    assert code == 0, said
    assert "going on with the unfinished build" in said
    assert "2 documents of 482 rows (filtered: 480 too_short)" in said
