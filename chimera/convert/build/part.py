"""One part of a stream from rows to shards, committed shard by shard.

Everything a part writes follows from its spans, the settings and the tokenizer: shard boundaries are counted in
blocks, the eval split is chosen by content, and `max_tokens` cuts after the document that reaches it.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from chimera.convert.build import part_state
from chimera.convert.build.batches import (
    OVERLAP,
    Counted,
    EncodedDocument,
    Found,
    batches,
    chosen,
    cut_at,
    encoded_rows,
    in_eval,
    overlapping,
)
from chimera.convert.build.last_rows import LastRows
from chimera.convert.build.part_lock import held_part
from chimera.convert.build.part_state import all_shard_keys, fits
from chimera.convert.build.plan import BuildPlan, encoder_of, held_out_of, reader_of, sample_file
from chimera.convert.build.shard_writer import ShardWriter
from chimera.convert.build.store import Uploader, check_claim, worker_store
from chimera.convert.encode.document import Document
from chimera.convert.encode.encoding import Encoder
from chimera.convert.encode.too_long import TOO_FEW, fitted
from chimera.convert.pack.packing import Packer
from chimera.convert.read.parsing import Dropped
from chimera.convert.read.reading import CorruptFile, Position, Row, reject_line
from chimera.convert.read.sources import rows
from chimera.mds import SPLITS, Array
from chimera.objects import Objects
from chimera.tokenizer_file import gave_up


@dataclass(frozen=True)
class Progress:
    """What a part has moved since its last report."""

    bytes: float = 0.0
    tokens: int = 0


Report = Callable[[Progress], None]
HELD_OUT = Dropped("filtered", "in_eval_sources")


def run_part(work: Path, stream: str, index: int, limit: int | None, report: Report, build: str | None = None) -> None:
    """Bring a part to its end, from wherever an earlier run left it.

    `limit` is the train tokens the part may hold: it ends after the document that reaches it. A part that has more
    already is done anew, and so is one that holds rows of a file that turned out damaged. Raises what `held_part` does,
    `UserError` for a damaged source, `OSError` for the disk.
    """
    with held_part(work, stream, index, build) as (plan, folder):
        state, settings = part_state.load(folder), plan.build_settings
        if state.done and fits(state, limit):
            return
        store = worker_store(settings.output, settings.retries) if settings.remote else None
        if not fits(state, limit):
            _remove(work, folder, stream, store)
        for split in SPLITS:
            (folder / split).mkdir(parents=True, exist_ok=True)
        encoder = encoder_of(work, plan, stream)
        try:
            with _Part(work, plan, stream, index, encoder, store) as part:
                part.run(limit, report)
        except CorruptFile:  # once the file is fixed, nothing that came of the damage may count
            _remove(work, folder, stream, store)
            sample_file(work, stream).unlink(missing_ok=True)  # of what planning read of it
            raise


def _remove(work: Path, folder: Path, stream: str, store: Objects | None) -> None:
    """Remove what is done of a part, in the store too."""
    if store:
        check_claim(store, work, stream)
        for key in all_shard_keys(stream, part_state.load(folder)):
            store.delete(key)
    shutil.rmtree(folder)


class _Part:
    def __init__(
        self, work: Path, plan: BuildPlan, stream: str, index: int, encoder: Encoder, store: Objects | None
    ) -> None:
        folder = plan.streams[stream].part_folder(work, index)
        self.build, self.plan, self.folder = plan.build_settings, plan.streams[stream], folder
        self.part, self.name = self.plan.parts[index], f"{index:05d}"
        self.encoder = encoder
        self.reader = reader_of(self.build, self.plan, encoder)
        self.held_out = held_out_of(work, plan, stream)
        self.eval_fraction = {"train": 0.0, "eval": 1.0}.get(str(self.plan.split), self.build.eval_fraction)
        self.shard_format = plan.shard_format(stream)
        self.state = part_state.load(folder)
        part_state.clean(folder, self.state)
        arrays = part_state.load_waiting(folder, self.state)
        self.splits = {name: self._writer(name, arrays) for name in SPLITS}
        self.uploader = Uploader(store, lambda: check_claim(store, work, stream)) if store else None
        self.rejects = open(folder / "rejects.jsonl", "ab")  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.rejects.close()
        if self.uploader:
            self.uploader.close()

    def _writer(self, name: str, arrays: dict[str, Array]) -> ShardWriter:
        mine = {key.removeprefix(f"{name}."): array for key, array in arrays.items() if key.startswith(f"{name}.")}
        form, fill, packing = self.shard_format, self.encoder.fill_id, self.plan.settings.packing
        packer = Packer(form.block_len, fill, packing, dtype=self.encoder.dtype, masked=form.masked)
        return ShardWriter(form, self.folder / name, self.name, self.state.splits[name], packer, mine)

    def run(self, limit: int | None, report: Report) -> None:
        self._send()
        with LastRows(self.folder, self.part) as last_rows:
            for batch in batches(self._documents()):
                last_rows.begin(batch)
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
        last_rows.remove()

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
        state, before, bytes_before = self.state, self.state.splits["train"].tokens, self.state.bytes
        if self.shard_format.masked or state.within or len(batch) == 1 or not self._add_texts(batch, limit):
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
            count = cut_at(limit - state.splits["train"].tokens, batch, np.where(enough & ~held, lengths, 0))
            enough, held = enough[:count], held[:count]
        state.count(*OVERLAP, overlapping(batch, enough))
        for name, which in (("train", enough & ~held), ("eval", enough & held)):
            ids, ends = chosen(encoded, which)
            if len(ids):
                state.max_token_id = max(state.max_token_id, int(ids.max()))
                self.splits[name].add_texts(ids, ends)
        if few := len(enough) - int(enough.sum()):
            state.filtered[TOO_FEW] = state.filtered.get(TOO_FEW, 0) + few
        for _, row, found in batch:
            if isinstance(found, Dropped):
                self._drop(row, found)
        self._step(batch)
        return True

    def _add_rows(self, batch: list[Found], limit: int | None) -> None:
        """Add a batch row by row: conversations, and a long text, which is committed on the way."""
        for span, row, found in encoded_rows(batch, self.encoder, self.eval_fraction, self._reject_line):
            if isinstance(found, Dropped):
                self._drop(row, found)
            elif found is not None:
                self._pack_row(*found)
            self._step([(span, row, found)])
            if limit is not None and self.state.splits["train"].tokens >= limit:
                break

    def _pack_row(self, split: str, documents: list[EncodedDocument], counted: Counted) -> None:
        """Count and pack the documents of a row, from where `within` says that an earlier run came to."""
        passed = 0
        while documents:
            document = documents.pop(0)
            if passed + len(document[0]) > self.state.within:
                self._pack(split, document, counted, passed)
            passed += len(document[0])
            counted = (("turns", "each"),)  # one more than there are rows

    def _pack(self, split: str, document: EncodedDocument, counted: Counted, passed: int) -> None:
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

    def _step(self, rows: Sequence[tuple[int, Row, object]]) -> None:
        """Move the position after rows, of which blank lines don't count."""
        state = self.state
        state.within = 0
        state.read += sum(found is not None for _, _, found in rows)
        state.bytes += sum(row.size for _, row, _ in rows)
        for state.span, row in {span: row for span, row, _ in rows}.items():  # of each span the last
            state.number, state.offset = row.after
            state.lines += [0] * (state.span + 1 - len(state.lines))
            state.lines[state.span] = row.after.number

    def _drop(self, row: Row, dropped: Dropped) -> None:
        counts = self.state.filtered if dropped.kind == "filtered" else self.state.rejected
        counts[dropped.reason] = counts.get(dropped.reason, 0) + 1
        if isinstance(row.raw, bytes):
            self.rejects.write(row.raw)
            part_state.note_reject(self.state, row.raw)

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
        if self.uploader:
            for split in self.splits.values():
                split.send(self.uploader, self.plan.name.removesuffix(part_state.EVAL))
