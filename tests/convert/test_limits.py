"""Bounds: a full disk, memory under one enormous line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

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
    [("-n 40", "error: too many open files: raise `ulimit -n` or lower `workers`"), ("-f 8", ": File too large: mend")],
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


@pytest.mark.parametrize("kind", ["one line of 100 MB", "lines of 1 MB", "equal values of 1 MB"])
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


def test_parquet_pages_of_many_long_rows_take_the_memory_of_one_row(tmp_path: Path) -> None:
    """A set of books: Arrow's writer puts a thousand rows into one page, its reader took several times their bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    books = [os.urandom(100_000).hex() + "a" * 200_000 for _ in range(500)]
    pq.write_table(pa.table({"text": books}), tmp_path / "books.parquet")
    assert pq.ParquetFile(tmp_path / "books.parquet").metadata.row_group(0).column(0).has_dictionary_page
    read = (
        "import re; from convert.reading import Position, Span, rows_of_file; "
        f"span = Span('parquet', '{tmp_path}/books.parquet', 0, None, 0); "
        "print(sum(len(row.value['text']) for row in rows_of_file(span, 'text', Position())), "
        "re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    found = subprocess.run([sys.executable, "-c", read], cwd=builds.ROOT, capture_output=True, text=True, check=True)
    size, kibibytes = map(int, found.stdout.split())
    assert size == 500 * 400_000
    assert kibibytes * 1024 < size
