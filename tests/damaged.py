"""A small build and a run on it, mutations of the files that they leave, and what a command makes of them."""

import json
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import run
from chimera.commands.train import main as train
from tests.convert import builds

ROOT = Path(__file__).resolve().parents[1]
DEEP = object()  # stands for lists within lists, which no JSON writer takes
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 1.5, -0.5, 2**31, 2**63, 2**64, 10**40, 10**4000, float("nan"), float("inf"), 1e300),
    *("", "x", "0", "../../x", "/etc/passwd", "a\0b", "\udcff", "\x1b[2J", "x" * 10**5, "漢" * 300, "2**63"),
    *([], {}, [[]], [None], {"": None}, {"x": {"x": 1}}, DEEP),
)


def make(folder: Path) -> None:
    """A finished build of texts and chats, and a run of two steps on it."""
    (folder / "texts.jsonl").write_bytes(builds.jsonl({"text": text} for text in builds.texts(1, 60)))
    (folder / "chats.jsonl").write_bytes(builds.jsonl(builds.chats(2, 30)))
    streams: dict[str, Any] = {"texts": {"sources": [{"files": [f"{folder}/texts.jsonl"]}]}}
    streams["chats"] = {"format": "chatml", "packing": "best_fit", "sources": [{"files": [f"{folder}/chats.jsonl"]}]}
    settings = builds.config(folder, folder / "shards", streams=streams, compression="zstd", workers=1)
    (folder / "shards.yaml").write_text(json.dumps(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHIMERA_ENCODER", "tokenizers")  # no comparison of engines
        builds.build_here(settings)
    assert train(words(folder)) == 0


def words(folder: Path, *more: str) -> list[str]:
    """The settings of that run, as the commands take them."""
    return [
        str(ROOT / "yamls/demo/base.yaml"),
        "phases=[{name: all, steps: 2, proportions: {texts: 0.5, chats: 0.5}}]",
        "curriculum.stages=[{from_step: 0, seq_len: 64}]",
        "model={hidden_size: 16, intermediate_size: 16, num_attention_heads: 2, num_hidden_layers: 1}",
        "generate.interval=0",
        *("eval={interval: 2, blocks: 4}", "save_interval=1", "global_train_batch_size=2", "max_passes=1000"),
        *(f"shards={folder}/shards", f"cache={folder}/cache", f"save_folder={folder}/run"),
        "scheduler={name: constant, warmup_steps: 0, decay_steps: 0}",
        *more,
    ]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All places in a value of JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


def with_value(rng: random.Random, text: bytes) -> bytes:
    """JSON with another value, without one, or with one more, somewhere."""
    value = json.loads(text)
    path = rng.choice(places(value))
    if not path:
        return dumped(rng.choice(VALUES))
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    way = rng.randrange(5)
    if way == 0:
        del holder[path[-1]]
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice(["x", "", "a/b", "..", "\x1b"])] = holder.pop(path[-1])
    elif way == 2 and isinstance(old := holder[path[-1]], int):
        holder[path[-1]] = rng.choice([old + 1, old - 1, -old, old * 2, float(old), str(old), 2**63 - 1, 10**40])
    else:
        holder[path[-1]] = rng.choice(VALUES)
    return dumped(value)


def dumped(value: Any) -> bytes:
    text = json.dumps(value, default=lambda _: "DEEP").encode("utf-8", "surrogateescape")
    return text.replace(b'"DEEP"', b"[" * 20_000 + b"]" * 20_000)


def with_line(rng: random.Random, text: bytes) -> bytes:
    """JSON lines of which one is changed, lost, doubled or moved."""
    lines = text.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    way = rng.randrange(5)
    if way == 0:
        lines.pop(at)
    elif way == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif way == 2:
        rng.shuffle(lines)
    else:
        before, brace, rest = lines[at].partition(b"{")  # a part's files have something in front of the JSON
        lines[at] = before + with_value(rng, brace + rest) + b"\n"
    return b"".join(lines)


def with_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes cut, flipped, zeroed, lost, doubled, or others."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    flipped = bytearray(data)
    for _ in range(rng.choice([1, 1, 8, 64])):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    few = min(end, at + rng.choice([1, 4, 64, 1 << 20]))
    ways = [
        data[:at],
        data[at:],
        b"",
        bytes(flipped),
        data[:at] + bytes(few - at) + data[few:],
        data[:at] + data[few:],
        data[:few] + data[at:],
        data[:at] + b"\xff\xfe\x80" + data[at:],
        rng.randbytes(few - at),
        data + rng.randbytes(64),
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"9" * 10_000,
    ]
    return rng.choice(ways)


def mutate(rng: random.Random, file: Path, data: bytes) -> str:
    """Put a mutation of `data` in the place of a file; returns what it is."""
    kinds: dict[str, Callable[[random.Random, bytes], bytes]] = {"bytes": with_bytes}
    if file.suffix == ".json":
        kinds["value"] = with_value
    elif file.suffix == ".jsonl":
        kinds["line"] = with_line
    kind = rng.choice(["bytes", *([*kinds][1:] * 3), *(["folder"] if rng.random() < 0.1 else [])])
    if kind == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(kinds[kind](rng, data))
    return kind


def restore(file: Path, data: bytes) -> None:
    with suppress(NotADirectoryError, FileNotFoundError):
        shutil.rmtree(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)


def outcome(main: Callable[[Sequence[str]], int | None], words: Sequence[str], capsys: Any) -> tuple[int, str, str]:
    """Exit code, results and messages of a command; a defect of ours is raised."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(main, words)
    said = capsys.readouterr()
    return int(end.value.code or 0), said.out, said.err
