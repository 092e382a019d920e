"""What of a part is done: one file, replaced whole at every commit, from which any process can go on.

`work/STREAM/PART/state.npz` holds the position in the source, the counters, the index entries of the shards written
so far and the tokens not yet in a shard. Files in the folder that the state does not name are leftovers of a killed
worker. A lock beside the folder keeps a worker that outlived its builder from writing into it.
"""

import fcntl
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from chimera.cli import UserError
from convert.shards import Array, Json, file_of, write_file

SPLITS = ("train", "eval")
SENT = ".sent"  # an empty file beside which a shard's file is gone: it has reached the object store


@dataclass
class SplitState:
    """What one split of a part has received; `tokens` and `documents` may still wait for a shard."""

    documents: int = 0
    tokens: int = 0
    padding: int = 0
    blocks: int = 0
    shards: list[Json] = field(default_factory=list)


@dataclass
class PartState:
    span: int = 0
    number: int = 0
    offset: int | None = None
    within: int = 0  # tokens of the document behind this position that are packed already
    done: bool = False
    limit: int | None = None  # the tokens the part was stopped at; None: it ended with its source
    bytes: float = 0.0  # of the source, as the progress bar counts
    read: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    reject_bytes: int = 0
    lines: list[int] = field(default_factory=list)  # physical lines (rows) passed in each span so far
    max_token_id: int = -1
    splits: dict[str, SplitState] = field(default_factory=lambda: {name: SplitState() for name in SPLITS})

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())


def shard_keys(stream: str, split: str, state: PartState) -> list[str]:
    """Where the shards of a part go, below the output."""
    return [f"{stream}/{split}/{file_of(entry)['basename']}" for entry in state.splits[split].shards]


def load(folder: Path) -> tuple[PartState, dict[str, Array]]:
    """The last committed state of a part and its arrays; a fresh one where there is none."""
    try:
        data = (folder / "state.npz").read_bytes()
    except FileNotFoundError:
        return PartState(), {}
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    values = json.loads(arrays.pop("json").tobytes())
    values["splits"] = {name: SplitState(**split) for name, split in values["splits"].items()}
    return PartState(**values), arrays


def save(folder: Path, state: PartState, arrays: dict[str, Array]) -> None:
    """Commit: from here on a rerun starts at this state."""
    text = np.frombuffer(json.dumps(asdict(state)).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, json=text, **arrays)
    write_file(folder / "state.npz", buffer.getvalue())


def clean(folder: Path, state: PartState) -> None:
    """Remove what a killed worker left behind its last commit."""
    for name, split in state.splits.items():
        known = {file_of(entry)["basename"] for entry in split.shards}
        for file in (folder / name).iterdir():
            if file.name.removesuffix(SENT) not in known:
                file.unlink()
    with open(folder / "rejects.jsonl", "ab") as out:
        if out.tell() < state.reject_bytes:
            raise UserError(f"{out.name} is shorter than it was: remove {folder} and run the same command again")
        out.truncate(state.reject_bytes)


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path`; yields whether it was free (always with `wait`). It dies with its holder."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield path.exists()  # or the holder before us has removed the folder with it
