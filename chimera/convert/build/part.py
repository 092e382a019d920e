"""One part of a stream from rows to shards, committed shard by shard.

Everything a part writes follows from its spans, the settings and the tokenizer: shard boundaries are counted in
blocks, the eval split is chosen by content, and `max_tokens` cuts after the document that reaches it.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from chimera.convert.build import part_state
from chimera.convert.build.batches import Found, batches, chosen, in_eval, split_of, until
from chimera.convert.build.held_out import HeldOut
from chimera.convert.build.part_state import PartState, all_shard_keys, shard_keys
from chimera.convert.build.plan import BuildPlan, encoder_of, held_out_file, load_plan, reader_of, sample_file
from chimera.convert.build.shard_writer import ShardWriter
from chimera.convert.build.store import Uploader, worker_store
from chimera.convert.encode.document import Document
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.too_long import TOO_FEW, fitted
from chimera.convert.pack.packing import Packer
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import RAW_SHOWN, CorruptFile, Position, Row, reject_line
from chimera.convert.read.sources import rows
from chimera.files import lock_file
from chimera.mds import SPLITS, Array
from chimera.objects import Objects
from chimera.tokenizer_file import gave_up

WHERE = "where"  # of a part's folder: the rows that were last begun with


@dataclass(frozen=True)
class Progress:
    """What a part has moved since its last report."""

    bytes: float = 0.0
    tokens: int = 0


Report = Callable[[Progress], None]
Counted = tuple[tuple[str, str], ...]
Encoded = tuple[Array, Array | None, list[int]]  # a document's ids, mask, ends of answers
ENCODER_FAILED = Dropped("rejected", "encoder_failed")
HELD_OUT = Dropped("filtered", "in_eval_sources")
Documents = tuple[str, list[Encoded], Counted]  # a row's: their split, each of them, what it counts


def run_part(work: Path, stream: str, index: int, limit: int | None, report: Report) -> None:
    """Bring a part to its end, from wherever an earlier run left it.

    `limit` is the train tokens the part may hold: it ends after the document that reaches it. A part that has more
    already is done anew, and so is one that holds rows of a file that turned out damaged. Raises `UserError` for a
    damaged source, `OSError` for the disk.
    """
    plan = load_plan(work)
    settings, folder = plan.build_settings, plan.streams[stream].part_folder(work, index)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock_file(folder.with_suffix(".lock"), wait=True):
        state = part_state.load(folder)
        store = worker_store(settings.output, settings.retries) if settings.remote else None
        if not fits(state, limit):
            _remove(folder, stream, store)
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        encoder = encoder_of(work, plan, stream)
        try:
            with _Part(work, plan, stream, index, encoder, store) as part:
                if not part.state.done:
                    part.run(limit, report)
        except CorruptFile:  # once the file is fixed, nothing that came of the damage may count
            _remove(folder, stream, store)
            sample_file(work, stream).unlink(missing_ok=True)  # of what planning read of it
            raise


def _remove(folder: Path, stream: str, store: Objects | None) -> None:
    """Remove what is done of a part, in the store too."""
    if store:
        for key in all_shard_keys(stream, part_state.load(folder)):
            store.delete(key)
    shutil.rmtree(folder)


def begun(folder: Path) -> str:
    """The rows that a part encoded last, or was about to when its process died."""
    try:
        return (folder / WHERE).read_text(encoding="utf-8")
    except OSError:
        return "its first rows"


def fits(state: PartState, limit: int | None) -> bool:
    """Whether a part that goes on from `state`, or ended with it, holds what it must under `limit` train tokens."""
    if limit is None or state.limit is not None:
        return state.limit == limit
    return state.splits["train"].tokens < limit


class _Part:
    def __init__(
        self, work: Path, plan: BuildPlan, stream: str, index: int, encoder: Encoder, store: Objects | None
    ) -> None:
        folder = plan.streams[stream].part_folder(work, index)
        self.build, self.plan, self.folder = plan.build_settings, plan.streams[stream], folder
        self.part, self.name = self.plan.parts[index], f"{index:05d}"
        self.encoder = encoder
        self.reader = reader_of(self.build, self.plan, encoder)
        self.held_out = HeldOut.read(held_out_file(work, stream) if self.plan.split == "train" else None)
        self.eval_fraction = {"train": 0.0, "eval": 1.0}.get(str(self.plan.split), self.build.eval_fraction)
        self.shard_format = plan.shard_format(stream)
        self.state = part_state.load(folder)
        part_state.clean(folder, self.state)
        arrays = part_state.load_waiting(folder, self.state)
        self.splits = {name: self._writer(name, arrays) for name in SPLITS}
        self.uploader = Uploader(store) if store else None
        self.rejects = open(folder / "rejects.jsonl", "ab")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.rejects.close()
        if self.uploader:
            self.uploader.close()

    def _writer(self, name: str, arrays: dict[str, Array]) -> ShardWriter:
        mine = {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}
        packer = Packer(
            self.shard_format.block_len,
            self.encoder.fill_id,
            self.plan.settings.packing,
            dtype=self.encoder.dtype,
            masked=self.shard_format.masked,
        )
        return ShardWriter(self.shard_format, self.folder / name, self.name, self.state.splits[name], packer, mine)

    def run(self, limit: int | None, report: Report) -> None:
        self._send()
        for batch in batches(self._documents()):
            self._note(batch)
            moved = self._add(batch, limit)
            self._write_shards()
            report(moved)
            if self.state.limit is not None:
                break
        for split in self.splits.values():
            split.packer.flush()
        self._write_shards(rest=True)
        self._commit()
        if self.uploader:
            self.uploader.finish()
        self.state.done = True
        self._commit()
        (self.folder / WHERE).unlink(missing_ok=True)

    def _note(self, batch: list[Found]) -> None:
        """Leave word of the rows that are encoded next, for who asks where the process died."""
        (span, first, _), (_, last, _) = batch[0], batch[-1]
        here = self.part.spans[span]
        begin = f", counted from its byte {here.begin}" if here.begin and first.unit == "line" else ""
        words = f"{first.unit} {first.number} of {first.file or here.file} to {last.unit} {last.number}{begin}"
        (self.folder / WHERE).write_text(words, encoding="utf-8", errors="replace")

    def _documents(self) -> Iterator[Found]:
        """The rows from the committed position on."""
        if self.state.limit is not None:
            return  # stopped before its last commit
        start, limits = Position(self.state.number, self.state.offset), self.build.limits(self.folder)
        for index in range(self.state.span, len(self.part.spans)):
            for row in rows(self.part.spans[index], self.plan.column, start, limits):
                yield index, row, self._document(index, row)
            start = Position()

    def _document(self, span: int, row: Row) -> Document | Dropped | None:
        """What a row holds. The row itself is emptied to save memory: `row.raw` becomes its reject line or `None`.

        (A reject line shows no more than the beginning of a long row.)
        """
        found = row.value if row.value is None or isinstance(row.value, Dropped) else self.reader.read(row.value)
        if isinstance(found, Document) and found in self.held_out:
            row.held_out = self.plan.settings.eval_overlap == "keep"
            found = found if row.held_out else HELD_OUT
        row.raw = self._reject_line(span, row, found) if isinstance(found, Dropped) else None
        row.value = None
        return found

    def _add(self, batch: list[Found], limit: int | None) -> Progress:
        """Count, encode and pack a batch, up to the document that reaches `limit`; empties `batch`."""
        state, before = self.state, self.state.splits["train"].tokens
        bytes_before = state.bytes
        by_row = self.shard_format.masked or state.within or len(batch) == 1
        if by_row or not self._add_texts(batch, limit):
            self._add_rows(batch, limit)
        if limit is not None and state.splits["train"].tokens >= limit:
            state.limit = limit
        return Progress(state.bytes - bytes_before, state.splits["train"].tokens - before)

    def _add_texts(self, batch: list[Found], limit: int | None) -> bool:
        """What `_add_rows` does, for all rows of a batch of texts at once; False where the tokenizer fails on one."""
        texts = [found for _, _, found in batch if isinstance(found, Document)]
        try:
            encoded = self.encoder.encode_batch(texts)
        except BaseException as error:
            if not gave_up(error):
                raise
            return False
        state, lengths = self.state, np.diff(encoded.ends)
        held = in_eval(texts, self.eval_fraction)
        enough = lengths - 1 - len(self.encoder.bos) >= self.plan.settings.min_tokens
        if limit is not None:
            missing = limit - state.splits["train"].tokens
            if count := until(missing, np.where(enough & ~held, lengths, 0)):
                enough, held = enough[:count], held[:count]
                of_text = [at for at, (_, _, found) in enumerate(batch) if isinstance(found, Document)]
                del batch[of_text[count - 1] + 1 :]
        for name, which in (("train", enough & ~held), ("eval", enough & held)):
            ids, ends = chosen(encoded, which)
            if len(ids):
                state.max_token_id = max(state.max_token_id, int(ids.max()))
                self.splits[name].add_texts(ids, ends)
        if few := len(enough) - int(enough.sum()):
            state.filtered[TOO_FEW] = state.filtered.get(TOO_FEW, 0) + few
        for span, row, found in batch:
            if isinstance(found, Dropped):
                self._drop(row, found)
            self._step(span, row, found is not None)
        return True

    def _add_rows(self, batch: list[Found], limit: int | None) -> None:
        """Add a batch row by row: conversations, and a long text, which is committed on the way."""
        for span, row, found in self._encode(batch):
            if isinstance(found, Dropped):
                self._drop(row, found)
            elif found is not None:
                self._pack_row(*found)
            self._step(span, row, found is not None)
            if limit is not None and self.state.splits["train"].tokens >= limit:
                break

    def _encode(self, batch: list[Found]) -> list[tuple[int, Row, Documents | Dropped | None]]:
        """The batch with its documents encoded; empties `batch`, so that a long text is not kept beside its ids."""
        held = [found for _, _, found in batch if isinstance(found, Document)]
        splits = [split_of(document, self.eval_fraction) for document in held]
        counted = [document.counted for document in held]
        of_rows = zip(splits, self._encoded(held), counted, strict=True)
        rows: list[tuple[int, Row, Documents | Dropped | None]] = []
        for span, row, found in batch:
            if isinstance(found, Document):
                split, documents, counts = next(of_rows)
                if documents is None:
                    row.raw, row.length = b"".join(found.texts)[:RAW_SHOWN], found.size
                    row.raw = self._reject_line(span, row, ENCODER_FAILED)
                    rows.append((span, row, ENCODER_FAILED))
                    continue
                rows.append((span, row, (split, documents, counts + tuple(("ignored", name) for name in row.unread))))
            else:
                rows.append((span, row, found))
        batch.clear()
        return rows

    def _encoded(self, held: list[Document]) -> list[list[Encoded] | None]:
        """The documents of each row; None for a row that the tokenizer fails on (by a panic, say)."""
        try:
            encoded = iter(self.encoder.encode_turns([each for first in held for each in (first, *first.more)]))
            return [list(islice(encoded, 1 + len(first.more))) for first in held]
        except BaseException as error:
            if not gave_up(error):
                raise
        return [None] if len(held) == 1 else [found for first in held for found in self._encoded([first])]

    def _pack_row(self, split: str, documents: list[Encoded], counted: Counted) -> None:
        """Count and pack the documents of a row, from where `within` says that an earlier run came to."""
        passed = 0
        while documents:
            document = documents.pop(0)
            if passed + len(document[0]) > self.state.within:
                self._pack(split, document, counted, passed)
            passed += len(document[0])
            counted = (("turns", "each"),)  # one more than there are rows

    def _pack(self, split: str, document: Encoded, counted: Counted, passed: int) -> None:
        """Count and pack a document; shards that a long one fills are committed on the way.

        `passed` are the tokens of the row's documents before it.
        """
        state, stream = self.state, self.plan.settings
        begin = max(0, state.within - passed)
        if passed and not begin:  # whatever becomes of it
            state.count(*counted[0])
            counted = ()
        found = fitted(*document, stream, self.shard_format.block_len, len(self.encoder.bos))
        if isinstance(found, str):
            state.filtered[found] = state.filtered.get(found, 0) + 1
            return
        ids, mask, way = found
        if way is not None and stream.packing != "concat":  # which cuts the short ones too
            counted = (*counted, ("too_long", way))
        for what, name in counted if begin == 0 else ():
            state.count(what, name)
        state.max_token_id = max(state.max_token_id, int(ids.max()))
        for packed in self.splits[split].add(ids, mask, begin):
            state.within = passed + packed
            self._write_shards()

    def _step(self, span: int, row: Row, read: bool) -> None:
        """Move the position after a row; `read` is whether it counts as one (blank lines don't)."""
        self.state.within = 0
        self.state.read += read
        if row.held_out:
            self.state.count("overlap", "rows")
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
        """Write the full shards that wait, with a commit after each; with `rest` the last, shorter ones too."""
        for split in self.splits.values():
            while split.write(rest):
                self._commit()

    def _commit(self) -> None:
        self.rejects.flush()
        if self.rejects.tell() != self.state.reject_bytes:
            os.fsync(self.rejects.fileno())  # the state says how much of it counts
            self.state.reject_bytes = self.rejects.tell()
        arrays = None
        if not self.state.waiting or any(split.changed for split in self.splits.values()):
            found = {name: split.arrays() for name, split in self.splits.items()}
            arrays = {f"{name}.{key}": array for name, split in found.items() for key, array in split.items()}
        part_state.save(self.folder, self.state, arrays)
        self._send()

    def _send(self) -> None:
        """Hand the committed shards that are still here to the uploader."""
        if self.uploader is None:
            return
        for name, split in self.splits.items():
            for key in shard_keys(self.plan.name, name, self.state)[split.sent :]:
                file = self.folder / name / Path(key).name
                if file.exists():
                    self.uploader.upload(file, key)
            split.sent = len(split.state.shards)
