"""Hub sets through the real client against a loopback hub, with everything that goes wrong there."""

import csv
import gzip
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.convert import builds
from tests.convert.build.test_crash import kill_until_done
from tests.convert.hub_server import COMMIT, HubServer
from tests.convert.read.test_limits import WIDE, peak

CARD = b"---\nconfigs:\n- config_name: it\n  data_files:\n  - split: train\n    path: it/*.parquet\n---\n"
SET, GATED, AWAY = "uonlp/CulturaX", "uonlp/Gated", "uonlp/Away"
TOKEN = "hf_secretsecretsecret"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two parquet files of three row groups, each group's text far after the last, so that each takes a request."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path_factory.mktemp("it")
    for i in range(2):
        blobs = [os.urandom(200_000) for _ in range(120)]
        table = pa.table({"text": builds.texts(30 + i, 120), "picture": blobs})
        pq.write_table(table, folder / f"part_{i}.parquet", row_group_size=40)
    return folder


@pytest.fixture(scope="module")
def hub(files: Path) -> Iterator[HubServer]:
    data = {"README.md": CARD, **{f"it/{path.name}": path.read_bytes() for path in sorted(files.iterdir())}}
    with HubServer({SET: data, GATED: data, AWAY: data}, gated=frozenset({GATED}), token=TOKEN) as server:
        server.away.add(AWAY)
        yield server


@pytest.fixture(autouse=True)
def no_fault_left(hub: HubServer) -> Iterator[None]:
    yield
    hub.faults.arm()


@pytest.fixture(scope="module")
def environment(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = str(tmp_path_factory.mktemp("hf"))
    return {"HF_ENDPOINT": hub.url, "HF_HOME": home, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}


class Builder:
    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.convert.hub_builder"],
            cwd=builds.ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, settings: dict[str, Any], **environment: str) -> tuple[str | None, str]:
        """(the error's message or `None`, everything said)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"settings": settings, "environment": environment}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        return answer["error"], answer["said"]

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def build(environment: dict[str, str]) -> Iterator[Builder]:
    builder = Builder(environment)
    yield builder
    builder.close()


@pytest.fixture(scope="module")
def wanted(files: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shards of the same files read from disk, each file one part."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    sizes = [sum(len(t.encode()) for t in builds.texts(30 + i, 120)) for i in range(2)]
    settings = builds.config(files, out, part_bytes=int(max(sizes) * 1.1))
    settings["streams"] = {"s": {"sources": [{"files": [f"{files}/*.parquet"]}]}}
    builds.build_here(settings)
    return shards(out)


def shards(output: Path) -> dict[str, str]:
    return {path: digest for path, digest in builds.tree(output).items() if path.startswith("s/")}


def settings_for(tmp_path: Path, *sources: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = builds.config(tmp_path, tmp_path / "out", retries=3, **changes)
    settings["streams"] = {"s": {"sources": list(sources)}}
    return settings


IT = {"hub": SET, "subset": "it"}


def arm(hub: HubServer, tmp_path: Path, after: int = 2, **faults: Any) -> None:
    """Faults once parts are read: after a part's footer and its first row group, unless told otherwise.

    Planning is not counted: what it fetches ahead may or may not be asked for before it ends.
    """
    hub.faults.arm(tmp_path / "out" / ".work" / "plan.json", after, **faults)


def test_a_set_is_read_at_a_recorded_commit_and_only_its_text(
    build: Builder, hub: HubServer, files: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    hub.sent.clear()
    error, said = build(settings_for(tmp_path, IT))
    assert error is None, said
    assert hub.unknown == []
    assert shards(tmp_path / "out") == wanted
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["source"]
    expected = {"hub": SET, "subset": "it", "split": "train", "revision": COMMIT, "format": "parquet", "data_files": 2}
    assert source == {"index": 0, "passed_over": [], "describe": expected}
    last = hub.sent["it/part_1.parquet"]  # the first file is read for the sample of its head as well
    assert last < (files / "part_1.parquet").stat().st_size * 0.01


def test_of_a_chat_set_nothing_but_the_conversations_is_fetched(build: Builder, hub: HubServer, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    chats = builds.chats(50, 120)
    columns = {key: [chat[key] for chat in chats] for key in ("instruction", "input", "output")}
    table = pa.table({**columns, "picture": [os.urandom(200_000) for _ in chats]})
    pq.write_table(table, tmp_path / "chats.parquet", row_group_size=40)
    body = (tmp_path / "chats.parquet").read_bytes()
    source = put_set(hub, "uonlp/Chats", "chats.parquet", body)
    hub.sent.clear()
    settings = settings_for(tmp_path, source)
    settings["streams"]["s"]["format"] = "chatml"
    error, said = build(settings)
    assert error is None, said
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["rows"]
    assert rows["documents"] == 120
    passes = 2  # the sample of its head takes all of so small a set
    assert hub.sent["chats.parquet"] < passes * len(body) * 0.02


def test_the_hub_is_asked_again_no_sooner_than_it_wants(
    build: Builder, hub: HubServer, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[float, bool]] = []  # each request for data: when, and whether it was refused
    real = hub.faults.next

    def watched() -> Any:
        fault = real()
        asked.append((time.monotonic(), fault is not None))
        return fault

    monkeypatch.setattr(hub.faults, "next", watched)
    arm(hub, tmp_path, statuses=[(429, {"Retry-After": "1"})] * 2)
    error, said = build(settings_for(tmp_path, IT))
    assert error is None, said
    refused = [i for i, (_, fault) in enumerate(asked) if fault]
    assert len(refused) == 2
    assert all(asked[i + 1][0] - asked[i][0] >= 1 for i in refused)
    assert shards(tmp_path / "out") == wanted


FAULTS = {
    "408": {"statuses": [(408, {})]},
    "429": {"statuses": [(429, {"Retry-After": "1"})]},
    "500 and 503": {"statuses": [(500, {}), (503, {})]},
    "reset": {"resets": 2},
    "slow": {"slow": 3},
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_between_rows_loses_and_repeats_none(
    build: Builder, hub: HubServer, wanted: dict[str, str], tmp_path: Path, name: str
) -> None:
    arm(hub, tmp_path, **FAULTS[name])
    error, said = build(settings_for(tmp_path, IT))
    assert error is None, said
    assert hub.faults.idle
    assert shards(tmp_path / "out") == wanted


def test_a_set_that_fails_after_rows_never_switches_and_a_rerun_goes_on(
    build: Builder, hub: HubServer, files: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    local = {"files": [f"{files}/*.parquet"]}
    arm(hub, tmp_path, statuses=[(429, {"Retry-After": "0"})] * 3)
    error, _ = build(settings_for(tmp_path, IT, local))
    assert error is not None
    assert "fails at row " in error
    assert "after 3 attempts" in error
    assert "it goes on where it stopped" in error
    error, said = build(settings_for(tmp_path, IT, local))
    assert error is None
    assert "going on with the unfinished build" in said
    assert shards(tmp_path / "out") == wanted


def test_a_rerun_does_not_fetch_row_groups_again_whose_rows_are_done(
    build: Builder, hub: HubServer, tmp_path: Path
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"text": [text * 40 for text in builds.texts(34, 120)], "picture": [os.urandom(20_000)] * 120}
    pq.write_table(pa.table(columns), tmp_path / "long.parquet", row_group_size=40, compression=None)
    meta = pq.ParquetFile(tmp_path / "long.parquet").metadata
    texts = sum(meta.row_group(group).column(0).total_compressed_size for group in range(3))
    source = put_set(hub, "uonlp/Groups", "long.parquet", (tmp_path / "long.parquet").read_bytes())
    settings = settings_for(tmp_path, source)
    arm(hub, tmp_path, after=3, statuses=[(429, {"Retry-After": "0"})] * 3)
    error, _ = build(settings)
    assert error is not None
    assert re.search("long.parquet fails at row (40|80) after 3 attempts", error)
    hub.sent.clear()
    error, said = build(settings)
    assert error is None, said
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["rows"]["read"] == 120
    assert hub.sent["long.parquet"] < 0.9 * texts  # the footer and two groups of three


def test_sources_that_do_not_open_are_passed_over_with_their_reason(
    build: Builder, wanted: dict[str, str], tmp_path: Path
) -> None:
    sources = [{"hub": name, "subset": "it"} for name in ("uonlp/Missing", GATED, AWAY)]
    error, said = build(settings_for(tmp_path, *sources, IT), HF_TOKEN="hf_nottherightone")
    assert error is None, said
    assert shards(tmp_path / "out") == wanted
    manifest = (tmp_path / "out" / "manifest.json").read_text()
    source = json.loads(manifest)["streams"]["s"]["source"]
    assert source["index"] == 3
    reasons = {passed["source"]: passed["reason"] for passed in source["passed_over"]}
    assert "Not Found" in reasons["uonlp/Missing (it)"]
    assert "it is gated: accept its terms on the hub and log in" in reasons[f"{GATED} (it)"]
    assert "out of reach after 3 attempts" in reasons[f"{AWAY} (it)"]
    assert all(reason in said for reason in reasons.values())
    assert "hf_nottherightone" not in manifest + said


def test_a_gated_set_opens_with_the_users_token_which_is_never_written(
    build: Builder, wanted: dict[str, str], tmp_path: Path
) -> None:
    error, said = build(settings_for(tmp_path, {"hub": GATED, "subset": "it"}), HF_TOKEN=TOKEN)
    assert error is None, said
    assert shards(tmp_path / "out") == wanted
    assert TOKEN not in said
    assert all(TOKEN.encode() not in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


def put_set(hub: HubServer, name: str, file: str, body: bytes) -> dict[str, Any]:
    """Have the hub hold a set of one file; its source."""
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {file}\n---\n".encode()
    hub.sets[name] = {"README.md": card, file: body}
    return {"hub": name}


PACKERS = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.zst": zstandard.compress}


@pytest.mark.parametrize("suffix", PACKERS)
def test_jsonl_of_a_set_is_read_by_line_and_a_bad_line_costs_one(
    build: Builder, hub: HubServer, tmp_path: Path, suffix: str
) -> None:
    body = builds.jsonl({"text": t} for t in builds.texts(40, 100)) + b"broken\n" + builds.jsonl([{"text": 5}])
    source = put_set(hub, f"uonlp/{suffix}-Lines", f"lines.{suffix}", PACKERS[suffix](body))
    arm(hub, tmp_path, after=0, resets=1)
    error, said = build(settings_for(tmp_path, source))
    assert error is None, said
    assert hub.faults.idle
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["rows"]
    assert rows["read"] == 102
    assert rows["rejected"] == {"unparseable": 1, "wrong_type": 1}
    packed = (tmp_path / "out" / "rejects" / "s.jsonl.zst").read_bytes()
    rejects = [json.loads(line) for line in zstandard.ZstdDecompressor().stream_reader(packed).read().splitlines()]
    file = f"hf://datasets/uonlp/{suffix}-Lines@{COMMIT}/lines.{suffix}"
    assert [(r["file"], r["line"], r["reason"]) for r in rejects] == [
        (file, 101, "unparseable"),
        (file, 102, "wrong_type"),
    ]


@pytest.mark.parametrize("suffix", ["json", "csv", "csv.gz", "txt", "arrow"])
def test_sets_of_other_formats_give_the_same_documents(
    build: Builder, hub: HubServer, tmp_path: Path, suffix: str
) -> None:
    import pyarrow as pa

    texts = [text.strip().replace("\n", " ") for text in builds.texts(41, 60)]
    if suffix == "arrow":
        sink = io.BytesIO()
        with pa.ipc.new_stream(sink, pa.schema([("text", pa.string())])) as writer:
            writer.write_table(pa.table({"text": texts}))
        body = sink.getvalue()
    else:
        table = io.StringIO()
        csv.writer(table).writerows([["text"], *[[text] for text in texts]])
        body = {"json": json.dumps([{"text": text} for text in texts]), "txt": "\n".join(texts)}.get(
            suffix, table.getvalue()
        ).encode()
        body = gzip.compress(body) if suffix.endswith("gz") else body
    error, said = build(settings_for(tmp_path, put_set(hub, f"uonlp/{suffix}-Other", f"data.{suffix}", body)))
    assert error is None, said
    (tmp_path / "same.jsonl").write_bytes(builds.jsonl({"text": text} for text in texts))
    (tmp_path / f"data.{suffix}").write_bytes(body)
    for file, output in (("same.jsonl", "lines"), (f"data.{suffix}", "local")):
        local = settings_for(tmp_path, {"files": [str(tmp_path / file)]})
        manifest = builds.build_here({**local, "output": str(tmp_path / output)})
        if file == "data.txt":  # not of a set, whose lines `datasets` reads: a file is a document
            assert manifest["streams"]["s"]["rows"]["read"] == 1
            continue
        assert shards(tmp_path / "out") == shards(tmp_path / output)


BOTH_READERS = """
import json, sys
from chimera.convert.read.hub import open_hub, rows_of_hub
from chimera.limits import Limits
from chimera.convert.read.reading import Position
from chimera.convert.stream_settings import SourceSettings
from datasets import load_dataset

def text(row):
    return row["text"].decode() if isinstance(row["text"], bytes) else row["text"]

for name in sys.argv[1:]:
    source = SourceSettings(hub=name, subset="it", split="validation", column="text")
    spans, limits = open_hub("s", source, "text", Limits(4 << 30))[1], Limits(4 << 30)
    ours = [text(row.value) for span in spans for row in rows_of_hub(span, "text", Position(), limits) if row.value]
    theirs = [row["text"] for row in load_dataset(name, "it", split="validation", streaming=True) if row["text"]]
    print(json.dumps([ours, theirs]))
"""
TWO_SUBSETS = """---
configs:
- config_name: en
  data_files: en/*
- config_name: it
  data_files:
  - {{split: train, path: it/c.{suffix}}}
  - {{split: validation, path: 'it/[ab].{suffix}'}}
{options}
---
"""


def every_format(texts: list[str], tmp_path: Path) -> dict[str, bytes]:
    """A file of the texts in each format a hub's set may have, by its suffix."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"id": list(map(str, range(len(texts)))), "text": texts})
    rows = table.to_pylist()
    bodies = {"txt": "\n\n".join(texts).encode(), "jsonl": builds.jsonl(rows), "json": json.dumps(rows).encode()}
    for suffix, delimiter in {"csv": ",", "tsv": "\t", "semicolons.csv": ";"}.items():
        lines = io.StringIO()
        csv.writer(lines, delimiter=delimiter).writerows([table.column_names, *(row.values() for row in rows)])
        bodies[suffix] = lines.getvalue().encode()
    for suffix, new in {"arrow": pa.ipc.new_stream, "file.arrow": pa.ipc.new_file}.items():
        sink = io.BytesIO()
        with new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
        bodies[suffix] = sink.getvalue()
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    bodies["parquet"] = (tmp_path / "a.parquet").read_bytes()
    return bodies | {f"{suffix}.gz": gzip.compress(bodies[suffix]) for suffix in ("txt", "jsonl", "json", "csv")}


def test_the_rows_are_those_of_load_dataset_streaming(
    hub: HubServer, environment: dict[str, str], tmp_path: Path
) -> None:
    texts = [re.sub(r"\s+", " ", text).strip() + ',;"' for text in builds.texts(44, 30)]
    names = []
    for suffix, body in every_format(texts, tmp_path).items():
        card = TWO_SUBSETS.format(suffix=suffix, options="  sep: ';'" if suffix == "semicolons.csv" else "")
        names.append(f"uonlp/{suffix}-Both")
        files = {f"{name}.{suffix}": body for name in ("en/a", "it/a", "it/b", "it/c")}
        hub.sets[names[-1]] = {"README.md": card.encode(), **files}
    done = subprocess.run(
        [sys.executable, "-c", BOTH_READERS, *names],
        cwd=builds.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name, line in zip(names, done.stdout.splitlines(), strict=True):
        ours, theirs = json.loads(line)
        assert theirs == texts * 2, name
        assert ours == theirs, name


@pytest.mark.parametrize("card", ["README.md", ".huggingface.yaml"])
def test_a_card_out_of_reach_is_not_taken_for_none(build: Builder, hub: HubServer, tmp_path: Path, card: str) -> None:
    named = "configs:\n- config_name: default\n  data_files: a.jsonl\n"
    texts = {name: builds.jsonl({"text": text} for text in builds.texts(45, 20)) for name in ("a.jsonl", "b.jsonl")}
    hub.sets[f"uonlp/Card{card}"] = {card: (f"---\n{named}---\n" if card == "README.md" else named).encode(), **texts}
    hub.instead[card] = [(408, {})] * 2  # from version 1 on, the hub's client asks for a file's size twice
    error, said = build(settings_for(tmp_path, {"hub": f"uonlp/Card{card}"}))
    assert error is None, said
    assert "attempt 2 of 3" in said
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["rows"]["read"] == 20


def test_sets_without_anything_to_read_are_passed_over_at_once(
    build: Builder, hub: HubServer, wanted: dict[str, str], tmp_path: Path
) -> None:
    hub.sets["uonlp/Script"] = {"Script.py": b"import datasets"}
    hub.sets["uonlp/Soon"] = {"README.md": b"# Soon"}
    hub.sets["uonlp/Broken"] = {"README.md": b"---\nconfigs: [{\n---\n", "a.jsonl": b"{}"}
    sources = [{"hub": f"uonlp/{name}"} for name in ("Script", "Soon", "Broken")]
    error, said = build(settings_for(tmp_path, *sources, IT))
    assert error is None, said
    assert "uonlp/Script passed over: Dataset scripts are no longer supported, but found Script.py" in said
    assert re.search("uonlp/Soon passed over: .* doesn't contain any data files", said)
    assert "uonlp/Broken passed over: while parsing a flow" in said
    assert "attempt" not in said
    assert shards(tmp_path / "out") == wanted


@pytest.mark.parametrize("card", [None, "- config_name: default\n  data_files: 'data/*/*'\n"])
def test_of_a_set_only_one_folder_is_read(build: Builder, hub: HubServer, tmp_path: Path, card: str | None) -> None:
    """As of The Stack, whose languages are folders."""
    bodies = {name: builds.jsonl({"text": text} for text in builds.texts(seed, 20)) for seed, name in enumerate("abc")}
    name = "uonlp/CardFolders" if card else "uonlp/Folders"
    hub.sets[name] = {"data/en/a.jsonl": bodies["a"], "data/it/b.jsonl": bodies["b"], "data/it/c.jsonl": bodies["c"]}
    hub.sets[name] |= {"README.md": f"---\nconfigs:\n{card}---\n".encode()} if card else {}
    error, said = build(settings_for(tmp_path, {"hub": name, "data_dir": "data/it"}))
    assert error is None, said
    assert f"source {name} (data/it), 2 parts" in said
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["source"]["describe"]
    assert (source["data_dir"], source["data_files"]) == ("data/it", 2)
    hub.sets["uonlp/Alone"] = {"b.jsonl": bodies["b"], "c.jsonl": bodies["c"]}
    build({**settings_for(tmp_path, {"hub": "uonlp/Alone"}), "output": str(tmp_path / "alone")})
    assert shards(tmp_path / "out") == shards(tmp_path / "alone")
    error, _ = build({**settings_for(tmp_path, {"hub": name, "data_dir": "data/de"}), "output": str(tmp_path / "none")})
    assert error == f"streams.s: {name} has no data files below `data/de`"


def test_a_subset_of_tsv_beside_one_of_jsonl_is_cut_at_tabs(build: Builder, hub: HubServer, tmp_path: Path) -> None:
    """`datasets` takes the first subset's format for that of all."""
    card = b"---\nconfigs:\n- config_name: en\n  data_files: a.jsonl\n- config_name: it\n  data_files: b.tsv\n---\n"
    texts = [f"{builds.PROSE}, {i}" for i in range(20)]
    hub.sets["uonlp/Two"] = {"README.md": card, "a.jsonl": b"{}\n", "b.tsv": "\n".join(["text", *texts]).encode()}
    error, said = build(settings_for(tmp_path, {"hub": "uonlp/Two", "subset": "it"}))
    assert error is None, said
    rows = json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["rows"]
    assert (rows["documents"], rows["rejected"]) == (20, {})


def test_a_card_that_wants_its_files_read_in_another_way_is_refused(
    build: Builder, hub: HubServer, tmp_path: Path
) -> None:
    card = b"---\nconfigs:\n- config_name: default\n  data_files: a.txt\n  sample_by: document\n---\n"
    hub.sets["uonlp/Documents"] = {"README.md": card, "a.txt": builds.PROSE.encode()}
    error, _ = build(settings_for(tmp_path, {"hub": "uonlp/Documents"}))
    assert error == (
        "streams.s: uonlp/Documents: its card has its files read with sample_by: 'document', which is not supported: "
        "load it with `datasets`, write it as parquet and give that as `files`"
    )


def test_a_file_of_a_set_that_nothing_reads_is_refused_at_once(build: Builder, hub: HubServer, tmp_path: Path) -> None:
    body = builds.jsonl({"text": text} for text in builds.texts(42, 50))
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - a.jsonl\n  - b.jsonl\n  - c.xml\n---\n"
    hub.sets["uonlp/Mixed"] = {"README.md": card, "a.jsonl": body, "b.jsonl": body, "c.xml": b"<text>a</text>"}
    error, said = build(settings_for(tmp_path, {"hub": "uonlp/Mixed"}))
    assert error is not None, said
    assert "c.xml: no reader for this kind of file (there is one for .parquet" in error
    assert "attempt" not in error + said
    assert not (tmp_path / "out" / ".work").exists()  # nothing has begun


def test_a_folder_with_the_name_of_a_set_is_not_taken_for_it(build: Builder, tmp_path: Path) -> None:
    error, _ = build(settings_for(tmp_path, {"hub": "tests/convert"}))
    assert error == (
        f"streams.s: tests/convert: a folder of that name in {builds.ROOT} stands in the way of the hub's set: run "
        "from another folder, or rename it"
    )


@pytest.mark.parametrize(
    "file",
    ["rows.jsonl", *(pytest.param(name, marks=pytest.mark.chaos) for name in ("rows.parquet", "rows.csv"))],
)
def test_a_row_of_100_mb_of_a_set_takes_less_than_a_gigabyte(
    hub: HubServer, environment: dict[str, str], tmp_path: Path, file: str
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"text": builds.PROSE}, {"text": WIDE}, {"text": builds.PROSE}]
    pq.write_table(pa.Table.from_pylist([{"text": WIDE * 2}, *rows]), tmp_path / "rows.parquet", row_group_size=1)
    (tmp_path / "rows.jsonl").write_bytes(builds.jsonl(rows))
    with open(tmp_path / "rows.csv", "w", newline="") as out:
        csv.writer(out).writerows([["text"], *([row["text"]] for row in rows)])
    source = put_set(hub, f"uonlp/{file}-Wide", file, (tmp_path / file).read_bytes())
    settings = settings_for(tmp_path, source, workers=1, shard_bytes=32 << 20)
    assert peak(settings, tmp_path, **environment) < 10**9
    del hub.sets[f"uonlp/{file}-Wide"]
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["streams"]["s"]["rows"]
    assert found["documents"] == 3
    assert found["rejected"] == ({"row_too_long": 1} if file == "rows.parquet" else {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"column": "txt"}, "has no column `txt`: set `column` to one of text, picture"),
        ({"split": "validation"}, "has no split `validation`; it has train"),
        ({"subset": "xx"}, "subset 'xx'"),
    ],
)
def test_a_set_that_is_there_but_wrong_is_refused(
    build: Builder, tmp_path: Path, change: dict[str, str], message: str
) -> None:
    error, said = build(settings_for(tmp_path, {**IT, **change}, IT))
    assert error is not None, said
    assert message in error


def test_a_stalled_set_is_named_and_survived(
    hub: HubServer, environment: dict[str, str], wanted: dict[str, str], tmp_path: Path
) -> None:
    arm(hub, tmp_path, stalls=1)
    code, said = builds.run(settings_for(tmp_path, IT, stall_after=0.5, workers=1), tmp_path, **environment)
    assert code == 0, said
    assert f"s: stalled: no row from part 0 (hf://datasets/{SET}@{COMMIT}/it/part_0.parquet) for 0.5 s" in said
    assert shards(tmp_path / "out") == wanted


def test_messages_hide_the_query_of_signed_addresses() -> None:
    from chimera.convert.read.hub import _say

    said = _say(OSError("500 for url: https://cdn.example/f?X-Amz-Signature=abc&x=1 (tried twice)"))
    assert said == "500 for url: https://cdn.example/f?… (tried twice)"


@pytest.mark.chaos
@pytest.mark.timeout(3600)
def test_chaos_kills_of_builds_from_the_hub(
    hub: HubServer, environment: dict[str, str], wanted: dict[str, str], tmp_path: Path
) -> None:
    rng = random.Random()
    kills = rounds = 0
    while kills < 16:
        folder = tmp_path / str(rounds)
        folder.mkdir()
        hub.faults.arm(after=rng.randrange(20), resets=1)
        settings = settings_for(folder, IT, workers=rng.choice([1, 2]))
        kills += kill_until_done(settings, folder, rng, most=8, start=10, **environment)
        assert shards(folder / "out") == wanted
        rounds += 1
    print(f"\nhub: {kills} kills over {rounds} builds, each ended byte-identical to the build from disk")


def test_reading_a_set_leaves_the_environment_as_it_was() -> None:
    """`USE_TORCH=0` left behind would take torch from transformers, and from `datasets` its shares of workers."""
    code = "import os; before = dict(os.environ); from chimera.convert.read import hub; hub._library()\n"
    code += "assert dict(os.environ) == before, os.environ.keys() - before.keys()"
    done = subprocess.run([sys.executable, "-c", code], cwd=builds.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
