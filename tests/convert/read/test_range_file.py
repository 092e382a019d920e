"""A file of a hub set read through the real client: every byte as it is, each fetched once, the next one ahead."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.convert import builds
from tests.convert.hub_server import COMMIT, HubServer

SCRIPT = """
import hashlib, io, json, random, sys
from chimera.convert.read import hub, range_file
range_file.PIECE = 1000
what = json.load(sys.stdin)
rng = random.Random(7)
with hub.HubFile(what["path"]) as below, io.BufferedReader(below, 300) as file:
    below.expect([tuple(r) for r in what["ranges"]], what["columns"])
    places = [begin for begin, _ in what["ranges"]]
    parts = [b""] * len(places)
    groups = [range(i, i + what["columns"]) for i in range(0, len(places), what["columns"])]
    for group in groups:
        while going := [i for i in group if places[i] < what["ranges"][i][1]]:
            i = rng.choice(going)
            file.seek(places[i])
            read = file.read(min(rng.randrange(1, 2500), what["ranges"][i][1] - places[i]))
            parts[i] += read
            places[i] += len(read)
    print(json.dumps([hashlib.sha256(part).hexdigest() for part in parts]))
    for begin, size in what["others"]:
        file.seek(begin)
        print(json.dumps(file.read(size).hex()))
"""


def read(hub: HubServer, home: Path, **what: Any) -> list[Any]:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=builds.ROOT,
        env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"},
        input=json.dumps({"path": f"hf://datasets/uonlp/Bytes@{COMMIT}/bytes.txt", **what}),
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in found.stdout.splitlines()]


def test_ranges_read_side_by_side_are_fetched_once_and_to_the_byte(tmp_path: Path) -> None:
    import hashlib

    rng = random.Random(3)
    data = rng.randbytes(60_000)
    with HubServer({"uonlp/Bytes": {"bytes.txt": data}}) as hub:
        for columns in (1, 3):
            sizes = [rng.choice([1, 700, 1000, 1001, 9000]) for _ in range(4 * columns)]
            ranges, at = [], 100
            for size in sizes:
                ranges.append((at, at + size))
                at += size + rng.choice([0, 50])
            hub.sent.clear()
            others = [(at + 10, 25), (len(data) - 5, 50), (len(data), 10), (50, 100)]
            digests, *rest = read(hub, tmp_path, ranges=ranges, columns=columns, others=others)
            assert digests == [hashlib.sha256(data[begin:end]).hexdigest() for begin, end in ranges]
            assert [bytes.fromhex(said) for said in rest] == [data[begin : begin + size] for begin, size in others]
            assert sum(sizes) <= hub.sent["bytes.txt"] <= sum(sizes) + 300 * len(others)
