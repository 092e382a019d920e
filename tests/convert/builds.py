"""What the builder's tests share: small sources of every kind, a tokenizer, builds and the hash of their output."""

import atexit
import functools
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from chimera.convert.build.executor import Event, Executor
from chimera.limits import Limits

LIMITS = Limits(4 << 30)
ROOT = Path(__file__).resolve().parents[2]
PROSE = (
    "il la un una di che non è perché città più università casa tempo acqua the of and water because light river "
    "mountain number energy 2024 3,14 naïve 東京 😀 — <|im_start|> <|endoftext|> l'anno dell'opera"
)


def text(rng: random.Random, words: int) -> str:
    """Words of two languages, some of them traps: other scripts, the text of special tokens."""
    return " ".join(rng.choices(PROSE.split(), k=words)) + rng.choice([".", "\n", "\n\n", " "])


def texts(seed: int, count: int) -> list[str]:
    """`count` texts from too short to several blocks long."""
    rng = random.Random(seed)
    return [text(rng, rng.choice([3, 20, 40, 80, 300])) for _ in range(count)]


def chats(seed: int, count: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [{"instruction": text(rng, 8), "input": text(rng, 3), "output": text(rng, 60)} for _ in range(count)]


def jsonl(rows: Iterable[Any]) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def as_bytes(value: Any) -> Any:
    """A value with its texts as the readers give them."""
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, dict):
        return {key: as_bytes(item) for key, item in value.items()}
    return [as_bytes(item) for item in value] if isinstance(value, list) else value


@functools.cache
def tokenizer() -> Path:
    """A byte-level BPE tokenizer of 600 entries, made once a process."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    found.train_from_iterator(texts(0, 100), trainer)
    folder = Path(tempfile.mkdtemp(prefix="chimera-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    found.save(str(folder / "tokenizer.json"))
    return folder


def write_sources(folder: Path) -> None:
    """One file of every kind: parquet of several row groups, JSONL plain, .gz and .zst, and conversations."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(2):
        table = pa.table({"id": list(range(120)), "text": texts(10 + i, 120)})
        pq.write_table(table, folder / f"{i}.parquet", row_group_size=40)
    rows = [{"text": t} for t in texts(20, 150)]
    (folder / "plain.jsonl").write_bytes(jsonl(rows) + b"broken\n")
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(jsonl({"text": t} for t in texts(21, 80)), mtime=0))
    (folder / "packed.jsonl.zst").write_bytes(
        b"".join(zstandard.compress(jsonl({"text": t} for t in texts(s, 40))) for s in (22, 23))
    )
    (folder / "chats.jsonl").write_bytes(jsonl(chats(24, 120)))


def config(sources: Path, output: Path | str, **changes: Any) -> dict[str, Any]:
    """A build of all of `write_sources`, small parts and small shards; `changes` are top-level settings."""
    return {
        "output": str(output),
        "tokenizer": {"path": str(tokenizer())},
        "block_len": 64,
        "shard_bytes": 6000,
        "part_bytes": 30_000,
        "workers": 2,
        "eval_fraction": 0.1,
        "streams": {
            "columns": {"sources": [{"files": [f"{sources}/*.parquet"]}]},
            "lines": {"sources": [{"files": [f"{sources}/plain.jsonl", f"{sources}/packed.*"]}]},
            "limited": {"max_tokens": 9000, "packing": "none", "sources": [{"files": [f"{sources}/plain.jsonl"]}]},
            "chats": {"format": "chatml", "packing": "best_fit", "sources": [{"files": [f"{sources}/chats.jsonl"]}]},
        },
        **changes,
    }


def start(settings: dict[str, Any], folder: Path, **environment: str) -> "subprocess.Popen[str]":
    """The builder as its own process (group), its messages piped."""
    path = folder / "shards.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return subprocess.Popen(
        [sys.executable, str(ROOT / "convert" / "build_shards.py"), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, **environment},
    )


def run(settings: dict[str, Any], folder: Path, **environment: str) -> tuple[int, str]:
    """Exit code and messages of a whole build."""
    process = start(settings, folder, **environment)
    said, _ = process.communicate(timeout=300)
    return process.returncode, said


def merged(settings: dict[str, Any]) -> Any:
    """Settings as the builder takes them."""
    from chimera.config import validated
    from chimera.convert.settings import BuildSettings

    return validated(BuildSettings, settings, "settings")


def build_here(settings: dict[str, Any], executor: Callable[[Path], Executor] | None = None) -> dict[str, Any]:
    """A build in this process, one part after another; returns its manifest."""
    from chimera.convert.build.build import build

    found = merged(settings)
    return build(found, (executor or Inline)(found.work_folder)).model_dump()


class _Stopped(BaseException):
    """Stands for a kill: nothing in the builder catches it."""


def build_with_stops(
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    rows: int,
    every: int,
    at_stop: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], int]:
    """A build of batches of `rows` that stops after a commit at `every` n-th batch; its manifest and the stops."""
    from chimera.convert.build import batches
    from chimera.convert.build import part as part_module

    add, calls = part_module._Part._add, [0]

    def add_and_stop(part: Any, *given: Any) -> Any:
        moved, calls[0] = add(part, *given), calls[0] + 1
        if calls[0] % every == 0:
            part._commit()
            at_stop()
            raise _Stopped
        return moved

    monkeypatch.setattr(batches, "BATCH_ROWS", rows)
    monkeypatch.setattr(part_module._Part, "_add", add_and_stop)
    for stops in range(100):
        try:
            return build_here(settings), stops
        except _Stopped:
            continue
    raise AssertionError("a hundred stops, and the build is not done")


class Inline(Executor):
    """Runs a part in the calling process, when its events are asked for."""

    def __init__(self, work: Path, slots: int = 1, last_first: bool = False) -> None:
        self.slots, self._work, self._last_first = slots, work, last_first
        self._tasks: list[Any] = []

    def start(self, task: Any) -> None:
        self._tasks.append(task)

    def wait(self, seconds: float) -> list[Any]:
        from chimera.convert.build.part import run_part
        from chimera.convert.build.part_lock import Busy

        task = self._tasks.pop(-1 if self._last_first else 0)
        try:
            run_part(self._work, task.stream, task.part, task.limit, lambda _: None, task.build)
        except Busy:
            return [Event("busy", task)]
        return [Event("done", task)]

    def cancel(self, task: Any) -> None:
        self._tasks.remove(task)

    def close(self) -> None:
        pass


def tree(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file below `folder`, unfinished work included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
