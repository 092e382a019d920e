"""One part of a stream from rows to shards, committed shard by shard.

Everything a part writes follows from its spans, the settings and the tokenizer: shard boundaries are counted in
blocks, the eval split is chosen by content, and `max_tokens` cuts behind the document that reaches it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert import journal
from convert.documents import Document, DocumentReader, Dropped
from convert.encoding import Encoder
from convert.journal import SPLITS, PartState, all_shard_keys, shard_keys
from convert.packing import Packer
from convert.planned import StreamPlan, encoder_of, load_plan, shard_format
from convert.reading import Damaged, Position, Row, reject_line
from convert.settings import BuildSettings
from convert.shards import Array
from convert.sources import rows
from convert.splits import Split
from convert.store import Sender, Store, worker_store

BATCH_BYTES = 1 << 19  # of text encoded together; a larger document is a batch of its own
BATCH_ROWS = 1024


@dataclass(frozen=True)
class Progress:
    """What a part has moved since its last report."""

    bytes: float = 0.0
    tokens: int = 0


Report = Callable[[Progress], None]
Found = tuple[int, Row, Document | Dropped | None]  # span, row, what it holds (`None`: a blank line)
Encoded = tuple[str, Array, Array | None]  # a document's split, ids and mask


def split_of(document: Document, eval_fraction: float) -> str:
    """`eval` for a fixed share of all documents, by their text alone, so that equal ones fall together."""
    import xxhash

    digest = xxhash.xxh3_64()
    for text in document.texts:
        digest.update(text)
    return "eval" if digest.intdigest() < eval_fraction * 2**64 else "train"


def run_part(work: Path, stream: str, index: int, limit: int | None, report: Report) -> None:
    """Bring a part to its end, from wherever an earlier run left it.

    `limit` is the train tokens the part may hold: it ends behind the document that reaches it. A part that has more
    already is done anew, and so is one that holds rows of a file that turned out damaged. Raises `UserError` for a
    damaged source, `OSError` for the disk.
    """
    build = load_plan(work)
    settings, plan = build.settings, build.streams[stream]
    folder = plan.part_folder(work, index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with journal.locked(folder.with_suffix(".lock"), wait=True):
        state, _ = journal.load(folder)
        store = worker_store(settings.output, work, settings.retries) if settings.remote else None
        if not fits(state, limit):
            _remove(folder, stream, store)
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        encoder = encoder_of(work, build, stream)
        try:
            with _Part(settings, plan, index, folder, encoder, store) as part:
                if not part.state.done:
                    part.run(limit, report)
        except Damaged:  # once the file is mended, nothing that came of the damage may count
            _remove(folder, stream, store)
            raise


def _remove(folder: Path, stream: str, store: Store | None) -> None:
    """Remove what is done of a part. Objects of a store that cannot delete stay: the part's redo overwrites them."""
    if store and store.can_delete:
        for key in all_shard_keys(stream, journal.load(folder)[0]):
            store.delete(key)
    shutil.rmtree(folder)


def fits(state: PartState, limit: int | None) -> bool:
    """Whether a part that goes on from `state`, or ended with it, holds what it must under `limit` train tokens."""
    if limit is None or state.limit is not None:
        return state.limit == limit
    return state.splits["train"].tokens < limit


class _Part:
    def __init__(
        self, build: BuildSettings, plan: StreamPlan, index: int, folder: Path, encoder: Encoder, store: Store | None
    ) -> None:
        self.build, self.plan, self.folder = build, plan, folder
        self.part, self.name = plan.parts[index], f"{index:05d}"
        self.encoder = encoder
        self.reader = DocumentReader(plan.settings, self.encoder.special_ids, plan.column or "")
        self.form = shard_format(build, plan.settings, np.dtype(encoder.dtype).name)
        self.state, arrays = journal.load(folder)
        journal.clean(folder, self.state)
        self.splits = {name: self._split(name, arrays) for name in SPLITS}
        self.sender = Sender(store) if store else None
        self.rejects = open(folder / "rejects.jsonl", "ab")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.rejects.close()
        if self.sender:
            self.sender.close()

    def _split(self, name: str, arrays: dict[str, Array]) -> Split:
        mine = {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}
        packer = Packer(
            self.form.block_len,
            self.encoder.pad_id,
            self.plan.settings.packing,
            dtype=self.encoder.dtype,
            masked=self.form.masked,
        )
        return Split(self.form, self.folder / name, self.name, self.state.splits[name], packer, mine)

    def run(self, limit: int | None, report: Report) -> None:
        self._send()
        for batch in _batches(self._documents()):
            moved = self._add(batch, limit)
            self._write_shards()
            report(moved)
            if self.state.limit is not None:
                break
        for split in self.splits.values():
            split.packer.flush()
        self._write_shards(rest=True)
        self._commit()
        if self.sender:
            self.sender.finish()
        self.state.done = True
        self._commit()

    def _documents(self) -> Iterator[Found]:
        """The rows from the committed position on."""
        if self.state.limit is not None:
            return  # stopped before its last commit
        start = Position(self.state.number, self.state.offset)
        for index in range(self.state.span, len(self.part.spans)):
            for row in rows(self.part.spans[index], self.plan.column, start, self.build.retries, self.folder):
                yield index, row, self._document(index, row)
            start = Position()

    def _document(self, span: int, row: Row) -> Document | Dropped | None:
        """What a row holds. The row itself is emptied to save memory: `row.raw` becomes its reject line or `None`.

        (A reject line shows no more than the beginning of a long row.)
        """
        found = row.value if row.value is None or isinstance(row.value, Dropped) else self.reader.read(row.value)
        row.raw = self._reject_line(span, row, found) if isinstance(found, Dropped) else None
        row.value = None
        return found

    def _add(self, batch: list[Found], limit: int | None) -> Progress:
        """Count, encode and pack a batch, up to the document that reaches `limit`; empties `batch`."""
        state, before = self.state, self.state.splits["train"].tokens
        bytes_before = state.bytes
        for span, row, found in self._encode(batch):
            if isinstance(found, Dropped):
                self._drop(row, found)
            elif found is not None:
                self._pack(*found)
            self._step(span, row, found is not None)
            if limit is not None and state.splits["train"].tokens >= limit:
                state.limit = limit
                break
        return Progress(state.bytes - bytes_before, state.splits["train"].tokens - before)

    def _encode(self, batch: list[Found]) -> list[tuple[int, Row, Encoded | Dropped | None]]:
        """The batch with its documents encoded; empties `batch`, so that a long text is not kept beside its ids."""
        documents = [found for _, _, found in batch if isinstance(found, Document)]
        splits = [split_of(document, self.build.eval_fraction) for document in documents]
        encoded = zip(splits, self.encoder.encode(documents), strict=True)
        rows: list[tuple[int, Row, Encoded | Dropped | None]] = []
        for span, row, found in batch:
            if isinstance(found, Document):
                split, ids = next(encoded)
                rows.append((span, row, (split, *ids)))
            else:
                rows.append((span, row, found))
        batch.clear()
        return rows

    def _pack(self, split: str, ids: Array, mask: Array | None) -> None:
        """Count and pack a document; shards that a long one fills are committed on the way."""
        state = self.state
        if len(ids) - 1 < self.plan.settings.min_tokens:
            state.filtered["too_few_tokens"] = state.filtered.get("too_few_tokens", 0) + 1
            return
        state.max_token_id = max(state.max_token_id, int(ids.max()))
        for packed in self.splits[split].add(ids, mask, state.within):
            state.within = packed
            self._write_shards()

    def _step(self, span: int, row: Row, read: bool) -> None:
        """Move the position behind a row; `read` is whether it counts as one (blank lines don't)."""
        self.state.within = 0
        self.state.read += read
        while len(self.state.lines) <= span:
            self.state.lines.append(0)
        self.state.span = span
        self.state.number, self.state.offset = row.after
        self.state.lines[span] = row.after.number
        self.state.bytes += row.size

    def _drop(self, row: Row, dropped: Dropped) -> None:
        counts = self.state.filtered if dropped.kind == "filtered" else self.state.rejected
        counts[dropped.reason] = counts.get(dropped.reason, 0) + 1
        if isinstance(row.raw, bytes):
            self.rejects.write(row.raw)

    def _reject_line(self, span: int, row: Row, dropped: Dropped) -> bytes | None:
        if dropped.kind == "filtered":
            return None
        line = reject_line(self.part.spans[span].file, dropped.reason, row)
        # Behind the span's index: line numbers count from the span's start, until publishing adds the lines before it.
        return b"%d " % span + line

    def _write_shards(self, rest: bool = False) -> None:
        """Write the full shards that wait, with a commit behind each; with `rest` the last, shorter ones too."""
        for split in self.splits.values():
            while split.write(rest):
                self._commit()

    def _commit(self) -> None:
        self.rejects.flush()
        os.fsync(self.rejects.fileno())  # the state says how much of it counts
        self.state.reject_bytes = self.rejects.tell()
        waiting = {} if self.state.done else self.splits
        arrays = {f"{name}.{key}": array for name, split in waiting.items() for key, array in split.arrays().items()}
        journal.save(self.folder, self.state, arrays)
        self._send()

    def _send(self) -> None:
        """Hand the committed shards that are still here to the sender."""
        if self.sender is None:
            return
        for name, split in self.splits.items():
            for key in shard_keys(self.plan.name, name, self.state)[split.sent :]:
                file = self.folder / name / Path(key).name
                if file.exists():
                    self.sender.send(file, key)
            split.sent = len(split.state.shards)


def _batches(found: Iterator[Found]) -> Iterator[list[Found]]:
    """Rows in order, in lists of about `BATCH_BYTES` of text."""
    batch: list[Found] = []
    size = 0
    for item in found:
        batch.append(item)
        size += item[2].size if isinstance(item[2], Document) else _size(item[1].raw)
        del item  # or its text would live on beside the blocks it becomes
        if size >= BATCH_BYTES or len(batch) >= BATCH_ROWS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(reject: object) -> int:
    return len(reject) if isinstance(reject, bytes) else 1
