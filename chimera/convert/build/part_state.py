"""What of a part is done: a journal of commits, from which any process can go on.

A commit appends one line to `commits.jsonl` in the part's folder: position in the source, counters, and the index
entries of the shards written since the line before, so its size does not grow with the part. The tokens not yet in a
shard lie in `waiting-N.npz`, made anew when they are others than the shards since then took from their front; the line
names it. Files in the folder that the last line does not name are leftovers of a killed worker. A lock beside the
folder keeps a worker that outlived its builder from writing into it.

Why a kill at any byte, or a power cut, costs no more than the commit it fell into:
- A line begins with the CRC of the rest and holds its own place in the file: it is whole, or no line.
- Whatever a line names is synced before the line is written. So a line that is whole counts, synced or not.
- What the line before names is removed once the new line is synced. A worker that begins syncs the line it found, as
  it may be of one that was killed before it could.
- What is not whole at the end is cut off before more is appended. In front of other lines it is damage, and refused.

Earlier versions replaced one file, `state.npz`, at every commit. Where there is one it counts, and goes with the
first line: until then a kill leaves the part where that file has it.
"""

import io
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from chimera.cli import UserError
from chimera.files import write_whole
from chimera.mds import SPLITS, Array, Json, file_of

COMMITS, OLD_STATE = "commits.jsonl", "state.npz"
MOST_NAMES, LONGEST_NAME, OTHER_NAMES = 100, 64, "…"
EVAL = ".eval_sources"  # behind a stream's name: its own validation set, which is built like a stream
SENT = ".sent"  # an empty file beside which a shard's file is gone: it has reached the object store


@dataclass
class SplitState:
    """What one split of a part has received; `tokens` and `documents` may still wait for a shard.

    `written` of the entries in `shards` are in the journal. `passed` blocks at the front of those in the file of what
    waits are in shards by now.
    """

    documents: int = 0
    tokens: int = 0
    padding: int = 0
    blocks: int = 0
    passed: int = 0
    written: int = 0
    shards: list[Json] = field(default_factory=list)


@dataclass
class PartState:
    end: int = 0  # bytes of the journal that count
    waiting: int = 0  # the number of the file of what waits; 0: there was no commit
    span: int = 0
    number: int = 0
    offset: int | None = None
    within: int = 0  # tokens of the document after this position that are packed already
    done: bool = False
    limit: int | None = None  # the tokens the part was stopped at; None: it ended with its source
    bytes: float = 0.0  # of the source, as the progress bar counts
    read: int = 0
    filtered: dict[str, int] = field(default_factory=dict)
    rejected: dict[str, int] = field(default_factory=dict)
    counted: dict[str, dict[str, int]] = field(default_factory=dict)  # of what, then by name: see `count`
    reject_bytes: int = 0
    reject_crc: int | None = 0  # of these bytes; None: of a part that an earlier version began
    lines: list[int] = field(default_factory=list)  # physical lines (rows) passed in each span so far
    max_token_id: int = -1
    splits: dict[str, SplitState] = field(default_factory=lambda: {name: SplitState() for name in SPLITS})

    @property
    def documents(self) -> int:
        return sum(split.documents for split in self.splits.values())

    def count(self, what: str, name: str, more: int = 1) -> None:
        """Count one of the documents, or `more`; names that data brings are cut, and bounded in number."""
        if not more:
            return
        counts = self.counted.setdefault(what, {})
        name = name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}…"
        if name not in counts and len(counts) >= MOST_NAMES:
            name = OTHER_NAMES
        counts[name] = counts.get(name, 0) + more


def fits(state: PartState, limit: int | None) -> bool:
    """Whether what `state` holds of a part is right under a limit of `limit` train tokens."""
    if limit is None or state.limit is not None:
        return state.limit == limit
    return state.splits["train"].tokens < limit


def shard_keys(stream: str, split: str, state: PartState) -> list[str]:
    """Where the shards of a part's split go, below the output."""
    return [f"{stream.removesuffix(EVAL)}/{split}/{file_of(entry)['basename']}" for entry in state.splits[split].shards]


def all_shard_keys(stream: str, state: PartState) -> list[str]:
    return [key for split in SPLITS for key in shard_keys(stream, split, state)]


def load(folder: Path) -> PartState:
    """The last committed state of a part; a fresh one where there is none. Raises `UserError` for a damaged one."""
    if (folder / OLD_STATE).exists():
        with _damage(folder, OLD_STATE):
            return _state(json.loads(_arrays(folder / OLD_STATE)["json"].tobytes()))
    try:
        data = (folder / COMMITS).read_bytes()
    except FileNotFoundError:
        return PartState()
    end, values = 0, None
    shards: dict[str, list[Json]] = {name: [] for name in SPLITS}
    with _damage(folder, COMMITS):
        lines = data.split(b"\n")[:-1]
        for number, line in enumerate(lines):
            if not _whole(line):
                if any(map(_whole, lines[number:])):
                    raise ValueError(f"at byte {end}")
                break  # a kill cut it off
            values = json.loads(line[9:])
            if values["end"] != end:
                raise ValueError(f"at byte {end}")
            for name, split in values["splits"].items():
                shards[name] += split["shards"]
            end += len(line) + 1
        if values is None:
            return PartState()
        state = _state(values)
    state.end = end
    for name, split in state.splits.items():
        split.shards, split.written = shards[name], len(shards[name])
    return state


def load_waiting(folder: Path, state: PartState) -> dict[str, Array]:
    """What waits for a shard, by `ShardWriter.arrays`'s names. Raises `UserError` where it is damaged."""
    name = _waiting(state) if state.waiting else OLD_STATE
    if not state.waiting and not (folder / name).exists():
        return {}
    with _damage(folder, name):
        return {key: array for key, array in _arrays(folder / name).items() if key != "json"}


def save(folder: Path, state: PartState, arrays: dict[str, Array] | None) -> None:
    """Commit: from here on a rerun starts at this state.

    `arrays` is what waits for a shard; `None`: what did at the last commit, but for the `passed` blocks.
    """
    before = folder / _waiting(state)
    if arrays is not None:
        state.waiting += 1
        buffer, entries = io.BytesIO(), dict[str, Any](arrays)
        np.savez(buffer, **entries)
        write_whole(folder / _waiting(state), buffer.getvalue())
    splits = {name: {**vars(split), "shards": split.shards[split.written :]} for name, split in state.splits.items()}
    text = json.dumps({**vars(state), "splits": splits}).encode()
    line = _crc(text) + text + b"\n"
    if state.end == 0:
        write_whole(folder / COMMITS, line)
        (folder / OLD_STATE).unlink(missing_ok=True)
    else:
        with open(folder / COMMITS, "ab") as out:
            out.write(line)
            out.flush()
            os.fsync(out.fileno())
    state.end += len(line)
    for split in state.splits.values():
        split.written = len(split.shards)
    if arrays is not None:
        before.unlink(missing_ok=True)


def clean(folder: Path, state: PartState) -> None:
    """Remove what a killed worker left behind its last commit."""
    if state.end:
        with open(folder / COMMITS, "ab") as out:
            out.truncate(state.end)
            os.fsync(out.fileno())  # what the line before names goes now
    for file in folder.glob("*waiting-*"):
        if file.name != _waiting(state):
            file.unlink()
    for name, split in state.splits.items():
        known = {file_of(entry)["basename"] for entry in split.shards}
        for file in (folder / name).iterdir():
            if file.name.removesuffix(SENT) not in known:
                file.unlink()
    with open(folder / "rejects.jsonl", "ab") as out:
        if out.tell() < state.reject_bytes:
            raise UserError(f"{out.name} is shorter than it was: remove {folder} and run the same command again")
        out.truncate(state.reject_bytes)
    check_rejects(folder, state)


def note_reject(state: PartState, line: bytes) -> None:
    """Count a line that is written to the reject file of a part."""
    if state.reject_crc is not None:
        state.reject_crc = zlib.crc32(line, state.reject_crc)


def check_rejects(folder: Path, state: PartState) -> None:
    """Raise `UserError` where the reject file of a part is not as it was when it was committed."""
    if state.reject_crc is None:
        return
    found, left = 0, state.reject_bytes
    with open(folder / "rejects.jsonl", "rb") as file:
        while left and (piece := file.read(min(left, 1 << 20))):
            found, left = zlib.crc32(piece, found), left - len(piece)
    if left or found != state.reject_crc:
        raise UserError(f"{file.name} is damaged: remove {folder} and run the same command again")


def _waiting(state: PartState) -> str:
    return f"waiting-{state.waiting}.npz"


def _crc(text: bytes) -> bytes:
    return b"%08x " % zlib.crc32(text)


def _whole(line: bytes) -> bool:
    return line[:9] == _crc(line[9:])


def _state(values: Json) -> PartState:
    splits = {name: SplitState(**split) for name, split in values["splits"].items()}
    return PartState(**{"reject_crc": None, **values, "splits": splits})


def _arrays(file: Path) -> dict[str, Array]:
    with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


@contextmanager
def _damage(folder: Path, name: str) -> Iterator[None]:
    """A file of the part that does not read is damaged."""
    try:
        yield
    except (
        FileNotFoundError, BadZipFile, EOFError, ValueError, LookupError, TypeError, AttributeError, zlib.error
    ) as error:  # fmt: skip
        raise UserError(f"{folder}/{name} is damaged ({error}): remove {folder} and run the command again") from None
