"""A hub set's rows by our reader and by `load_dataset(..., streaming=True)`, from the same hub on loopback.

`python bench/hub.py [--books N] [--megabytes N] [--json FILE]`

    books    one row group of books of 400 kB, as Arrow's writer makes it, all in one page: read whole
    pages    texts of 4 kB in row groups of a thousand: read whole, then again from nine tenths on, as after a kill

Each reading is a process of its own: seconds and peak of memory with its imports, and the bytes the hub sent. This is
the case for reading files ourselves: see also apache/arrow#39808, huggingface/datasets#7269 and #7440. (A reader of
`datasets` goes on by its `state_dict`.)
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # so imports of the project come after it

from tests.convert.hub_server import HubServer

SET = "bench/set"
CARD = b"---\nconfigs:\n- config_name: default\n  data_files: data.parquet\n---\n"
TELL = """
import hashlib, itertools, json, re, sys, time
began, (_, name, skip, stop) = time.perf_counter(), sys.argv
count, digest, state = 0, hashlib.sha256(), None
{reader}
peak = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]
print(json.dumps({{"seconds": round(time.perf_counter() - began, 1), "peak_megabytes": int(peak) * 1024 // 10**6,
                   "rows": count, "digest": digest.hexdigest(), "state": state}}))
"""
OURS = """
from chimera.convert.read.hub import open_hub, rows_of_hub
from chimera.limits import Limits
from chimera.convert.read.reading import Position
from chimera.convert.stream_settings import SourceSettings
limits = Limits(4 << 30)
_, spans = open_hub("s", SourceSettings(hub=name, column="text"), "text", limits)
start = Position(*json.loads(skip)) if skip else Position()
for row in itertools.islice((r for span in spans for r in rows_of_hub(span, "text", start, limits)), int(stop)):
    count, state = count + 1, row.after
    digest.update(row.value["text"])
"""
THEIRS = """
from datasets import load_dataset
rows = load_dataset(name, split="train", streaming=True, columns=["text"])
if skip:
    rows.load_state_dict(json.loads(skip))
for row in itertools.islice(rows, int(stop)):
    count += 1
    digest.update(row["text"].encode())
state = rows.state_dict()
"""
READERS = {"ours": OURS, "load_dataset": THEIRS}
ALL = 1 << 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=int, default=1000, help="of 400 kB")
    parser.add_argument("--megabytes", type=int, default=100, help="of texts of 4 kB; 0 leaves them out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pages = args.megabytes * 250
    with tempfile.TemporaryDirectory() as folder, HubServer({}) as hub:
        found: dict[str, Any] = {"books": {}} | ({"pages": {}, "pages, the last tenth": {}} if pages else {})
        put(hub, folder, args.books, 100_000, args.books)
        for name, reader in READERS.items():
            found["books"][name] = read(hub, folder, reader)
        if pages:
            put(hub, folder, pages, 1000, 1000)
        for name, reader in READERS.items() if pages else ():
            found["pages"][name] = read(hub, folder, reader)
            before = read(hub, folder, reader, stop=pages * 9 // 10)
            found["pages, the last tenth"][name] = read(hub, folder, reader, skip=json.dumps(before["state"]))
    for ways in found.values():
        assert len({(way["rows"], way.pop("digest")) for way in ways.values()}) == 1, "the readers' rows differ"
        for way in ways.values():
            del way["state"]
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


def put(hub: HubServer, folder: str, rows: int, unit: int, group: int) -> None:
    """Have the hub hold one parquet file of `rows` texts of 4 × `unit` bytes, half of them random."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(folder, "data.parquet")
    texts = pa.table({"text": [os.urandom(unit).hex() + "a" * (2 * unit) for _ in range(rows)]})
    pq.write_table(texts, path, row_group_size=group)
    hub.sets[SET] = {"README.md": CARD, "data.parquet": path.read_bytes()}


def read(hub: HubServer, folder: str, reader: str, skip: str = "", stop: int = ALL) -> dict[str, Any]:
    """What one reading took, with the rows' number and digest and the place it came to."""
    hub.sent.clear()
    with tempfile.TemporaryDirectory(dir=folder) as home:  # what the hub's client keeps is of one set
        done = subprocess.run(
            [sys.executable, "-c", TELL.format(reader=reader), SET, skip, str(stop)],
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": home},
            check=True,
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
    return {**json.loads(done.stdout), "sent_megabytes": round(sum(hub.sent.values()) / 1e6)}


if __name__ == "__main__":
    main()
