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
from convert.journal import SPLITS, PartState, shard_keys
from convert.packing import Packer
from convert.planned import StreamPlan, encoder_of, load_plan, part_folder, shard_format
from convert.reading import Position, Row, reject_line
from convert.settings import BuildSettings
from convert.shards import Array, write_shard
from convert.sources import rows
from convert.store import Sender, Store, worker_store

BATCH_BYTES = 1 << 19  # of text encoded together; a larger document is a batch of its own
BATCH_ROWS = 1024
SLICE = 1 << 22  # tokens of a longer document that are packed at a time


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
    already is done anew. Raises `UserError` for a damaged source, `OSError` for the disk.
    """
    build = load_plan(work)
    settings, plan = build.settings, build.streams[stream]
    folder = part_folder(work, stream, index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with journal.locked(folder.with_suffix(".lock"), wait=True):
        state, _ = journal.load(folder)
        store = worker_store(settings.output, work, settings.retries) if settings.remote else None
        if not fits(state, limit):
            if store:
                for key in [key for split in SPLITS for key in shard_keys(stream, split, state)]:
                    store.delete(key)
            shutil.rmtree(folder)
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        encoder = encoder_of(work, build, stream)
        with _Part(settings, plan, index, folder, encoder, store) as part:
            if not part.state.done:
                part.run(limit, report)


def fits(state: PartState, limit: int | None) -> bool:
    """Whether a part's state leads to, or is, what the part must hold under `limit` train tokens."""
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
        self.splits = {name: _Split(name, self, arrays) for name in SPLITS}
        self.sender = Sender(store) if store else None
        self.rejects = open(folder / "rejects.jsonl", "ab")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.rejects.close()
        if self.sender:
            self.sender.close()

    def run(self, limit: int | None, report: Report) -> None:
        self._send()
        for batch in _batches(self._documents()):
            moved = self._add(batch, limit)
            if any(split.pending_blocks >= self.form.blocks_per_shard for split in self.splits.values()):
                self._commit()
            report(moved)
            if self.state.limit is not None:
                break
        for split in self.splits.values():
            split.finish()
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
            for row in rows(self.part.spans[index], self.plan.column, start, self.build.retries):
                yield index, row, self._document(index, row)
            start = Position()

    def _document(self, span: int, row: Row) -> Document | Dropped | None:
        """What a row holds; of the row itself stays its reject line at most, which is short where the row is long."""
        found = row.value if row.value is None or isinstance(row.value, Dropped) else self.reader.read(row.value)
        row.raw = self._reject_line(span, row, found) if isinstance(found, Dropped) else None
        row.value = None
        return found

    def _add(self, batch: list[Found], limit: int | None) -> Progress:
        """Count, encode and pack a batch, up to the document that reaches `limit`; empties `batch`."""
        state, before = self.state, self.state.splits["train"].tokens
        bytes_before = state.bytes
        for span, row, found in self._encode(batch):
            self._step(span, row)
            if found is None:
                continue
            state.read += 1
            if isinstance(found, Dropped):
                self._drop(row, found)
                continue
            split, ids, mask = found
            if len(ids) - 1 < self.plan.settings.min_tokens:
                state.filtered["too_few_tokens"] = state.filtered.get("too_few_tokens", 0) + 1
                continue
            state.max_token_id = max(state.max_token_id, int(ids.max()))
            self.splits[split].add(ids, mask)
            if limit is not None and state.splits["train"].tokens >= limit:
                state.limit = limit
                break
        for name in SPLITS:
            self.splits[name].take()
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

    def _step(self, span: int, row: Row) -> None:
        """Move the position behind a row."""
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
        # the span's place goes along: lines of a range are counted from its start until all parts are known
        return b"%d " % span + line

    def _commit(self) -> None:
        for split in self.splits.values():
            split.write()
        self.rejects.flush()
        os.fsync(self.rejects.fileno())  # the state says how much of it counts
        self.state.reject_bytes = self.rejects.tell()
        arrays = {f"{n}.{k}": v for n, split in self.splits.items() for k, v in split.arrays().items()}
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


class _Split:
    """A part's share of `train` or `eval`: the packer and the blocks that wait for a shard."""

    def __init__(self, name: str, part: _Part, arrays: dict[str, Array]) -> None:
        self.name, self.part, self.form = name, part, part.form
        self.sent = 0  # shards handed to the sender
        self.state = part.state.splits[name]
        encoder = part.encoder
        self.packer = Packer(
            self.form.block_len,
            encoder.pad_id,
            part.plan.settings.packing,
            dtype=encoder.dtype,
            masked=self.form.masked,
        )
        mine = {k.removeprefix(f"{name}."): v for k, v in arrays.items() if k.startswith(f"{name}.")}
        self.blocks: list[Array] = [mine.pop("blocks")] if "blocks" in mine else []
        self.masks: list[Array] = [mine.pop("masks")] if "masks" in mine else []
        if mine:
            self.packer.restore(mine)

    @property
    def pending_blocks(self) -> int:
        return sum(len(blocks) for blocks in self.blocks)

    def add(self, ids: Array, mask: Array | None) -> None:
        """Pack a document: a long one in slices, its shards written on the way, so that it is in memory once.

        Slices of whole blocks give the blocks of the whole document, whatever the packing.
        """
        step = max(1, SLICE // self.form.block_len) * self.form.block_len
        if len(ids) <= step:
            self.packer.add(ids, mask)
        else:
            for begin in range(0, len(ids), step):
                piece = slice(begin, begin + step)  # copied, or what is left over would keep the whole document
                self.packer.add(ids[piece].copy(), mask[piece].copy() if mask is not None else None)
                self.take()
                self.write()
        self.state.documents += 1
        self.state.tokens += len(ids)

    def take(self) -> None:
        """Collect the blocks the packer has finished."""
        blocks, masks, padding = self.packer.take()
        if len(blocks):
            self.blocks.append(blocks)
            if masks is not None:
                self.masks.append(masks)
            self.state.blocks += len(blocks)
            self.state.padding += padding

    def finish(self) -> None:
        """Turn everything that waits into blocks, and those into shards."""
        self.packer.flush()
        self.take()
        self.write(rest=True)

    def write(self, rest: bool = False) -> None:
        """Write as many full shards as wait; with `rest` the last, shorter one too."""
        while self.pending_blocks >= (1 if rest else self.form.blocks_per_shard):
            blocks = np.concatenate(self.blocks)
            masks = np.concatenate(self.masks) if self.masks else None
            n = self.form.blocks_per_shard
            name = f"shard.{self.part.name}.{len(self.state.shards):05d}"
            now = masks[:n] if masks is not None else None
            self.state.shards.append(write_shard(self.form, self.part.folder / self.name, name, blocks[:n], now))
            self.blocks, self.masks = [blocks[n:]], [masks[n:]] if masks is not None else []

    def arrays(self) -> dict[str, Array]:
        """What waits for a shard, for the journal."""
        found = {"blocks": np.concatenate(self.blocks)} if self.blocks else {}
        if self.masks:
            found["masks"] = np.concatenate(self.masks)
        return {**self.packer.state(), **found} if not self.part.state.done else {}
