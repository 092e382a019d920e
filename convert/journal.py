"""What of a part is done: one file, replaced whole at every commit, from which any process can go on.

`state.npz` in a part's folder holds the position in the source, the counters, the index entries of the shards written
so far and the tokens not yet in a shard. Files in the folder that the state does not name are leftovers of a killed
worker. A lock beside the folder keeps a worker that outlived its builder from writing into it.
"""

import fcntl
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from zipfile import BadZipFile

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
    """Where the shards of a part's split go, below the output."""
    return [f"{stream}/{split}/{file_of(entry)['basename']}" for entry in state.splits[split].shards]


def all_shard_keys(stream: str, state: PartState) -> list[str]:
    return [key for split in SPLITS for key in shard_keys(stream, split, state)]


def load(folder: Path) -> tuple[PartState, dict[str, Array]]:
    """The last committed state of a part and its arrays; a fresh one where there is none.

    Raises `UserError` for a damaged one.
    """
    try:
        data = (folder / "state.npz").read_bytes()
    except FileNotFoundError:
        return PartState(), {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        values = json.loads(arrays.pop("json").tobytes())
        values["splits"] = {name: SplitState(**split) for name, split in values["splits"].items()}
        return PartState(**values), arrays
    except (BadZipFile, EOFError, ValueError, LookupError, TypeError, AttributeError, zlib.error) as error:
        raise UserError(f"{folder}/state.npz is damaged ({error}): remove {folder} and run the command again") from None


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
def lock_of(work: Path) -> Iterator[bool]:
    """Hold the work folder, made if need be and removed if it ends empty; yields whether nobody else did."""
    work.mkdir(parents=True, exist_ok=True)
    lock = work / "lock"
    try:
        with locked(lock, wait=False) as free:
            try:
                yield free
            finally:
                if free and [*work.iterdir()] == [lock]:
                    lock.unlink()
    finally:
        with suppress(OSError):  # it holds work; or it is a link
            work.rmdir()


def empty(work: Path) -> None:
    """Remove what the work folder holds, but for its lock, which `lock_of` removes."""
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


@contextmanager
def locked(path: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock file `path`; yields whether it is ours now. It dies with its holder.

    With `wait` it is, unless its holder removed it meanwhile.
    """
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield _is_at(path, file.fileno())  # or the holder before us removed it, and others hold one made since


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
