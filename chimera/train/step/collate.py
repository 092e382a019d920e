"""Blocks → what the model takes: sequences, labels and position ids.

`collate` turns one step's record into tensors of whole blocks; `view_sequences` views them at the step's sequence
length. Nothing is copied away or dropped in between: a block `[1024]` becomes `[4, 256]`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chimera.train.data.shards import ShardsTokenizer
from chimera.train.settings import TrainSettings

IGNORED = -100  # the label that no loss is computed for


@dataclass(frozen=True)
class StepInfo:
    """What is known of a step besides its tokens; the same on all ranks but for `first_sequence`, `sequences`."""

    step: int
    phase: str
    seq_len: int
    digest: str  # of the global batch
    streams: dict[str, int]  # positions of the global batch
    first_sequence: int  # of this rank's slice, counted from the first block below
    sequences: int  # of this rank's slice
    unpacked: tuple[bool, ...]  # per block: it holds a single document (packing `none`)
    numbers: tuple[int, ...] = ()  # per block: its stream, by its place in the plan's
    starts: tuple[bool, ...] = ()  # per block: its mask says where documents start


@dataclass(frozen=True)
class LabelRules:
    """The ids and rules that labels depend on; an id of -1 is no token's."""

    eos_id: int
    pad_id: int
    train_on: str  # all | assistant
    document_mask: bool
    bos_id: int = -1  # of shards whose documents are told apart by how they begin

    @classmethod
    def of(cls, tokenizer: ShardsTokenizer, settings: TrainSettings) -> "LabelRules":
        """What the shards and the settings say."""
        eos_id = tokenizer.eos_id if tokenizer.document_ends == "eos" else -1
        bos_id = tokenizer.bos[0] if tokenizer.document_ends == "bos" else -1
        return cls(eos_id, tokenizer.pad_id, settings.train_on, settings.document_mask, bos_id)


def collate(record: dict[str, Any], unpacked_streams: frozenset[int]) -> dict[str, Any]:
    """One record of `MixtureDataset` → `{"tokens": [blocks, block_len] int64, "assistant": bool | None, "info"}`.

    `unpacked_streams` are the indices of the streams packed `none`.
    """
    assistant = record["assistant"]
    info = StepInfo(
        step=int(record["step"]),
        phase=record["phase"],
        seq_len=int(record["seq_len"]),
        digest=record["digest"],
        streams=dict(record["streams"]),
        first_sequence=int(record["first_sequence"]),
        sequences=int(record["sequences"]),
        unpacked=tuple(int(stream) in unpacked_streams for stream in record["stream"]),
        numbers=tuple(map(int, record["stream"])),
        starts=tuple(map(bool, record["starts"])),
    )
    return {
        "tokens": torch.from_numpy(record["tokens"].astype(np.int64)),
        "assistant": None if assistant is None else torch.from_numpy(np.ascontiguousarray(assistant)),
        "info": info,
    }


def view_sequences(batch: dict[str, Any], rules: LabelRules) -> dict[str, Tensor]:
    """View a step's blocks as this rank's sequences.

    Returns `input_ids`, `labels`, `position_ids`, each `[sequences, seq_len] int64`. Labels are unshifted (the
    loss compares position t with label t+1) and `IGNORED` at PAD, at the first token of each document (nothing
    before it predicts it) and, with `train_on: assistant`, at every token the assistant does not say. Position
    ids restart at 0 with each sequence and, with `document_mask`, with each document: `transformers` derives
    from them which tokens may see each other.
    """
    info: StepInfo = batch["info"]
    rows = slice(info.first_sequence, info.first_sequence + info.sequences)
    input_ids = batch["tokens"].view(-1, info.seq_len)[rows]
    said = batch["assistant"]
    may_start = None
    if said is not None and any(info.starts):
        may_start = (said | ~torch.tensor(info.starts)[:, None]).view(-1, info.seq_len)[rows]
    starts = document_starts(input_ids, rules, may_start)
    trained = (input_ids != rules.pad_id) & ~starts
    if rules.train_on == "assistant" and said is not None:
        trained &= said.view(-1, info.seq_len)[rows]
    labels = torch.where(trained, input_ids, IGNORED)
    position_ids = positions(starts if rules.document_mask else torch.zeros_like(starts))
    views = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    if info.unpacked and all(info.unpacked):  # single documents: no need to compute on padding all of them share
        width = longest(input_ids, rules.pad_id)
        views = {name: tensor[:, :width].contiguous() for name, tensor in views.items()}
    return views


def document_starts(input_ids: Tensor, rules: LabelRules, may_start: Tensor | None = None) -> Tensor:
    """Where documents start within sequences, `[sequences, seq_len] bool`; a run of PAD counts as one document.

    A sequence's own first token is not a start: it may go on with a document from the sequence before. `may_start`, of
    the same shape, says behind which EOS one starts (None: behind each); behind another EOS one always does.
    """
    before, here = input_ids[:, :-1], input_ids[:, 1:]
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    ended = before == rules.eos_id
    if may_start is not None:
        ended &= may_start[:, 1:] | (here == rules.eos_id)
    starts[:, 1:] = ended | (here == rules.bos_id)
    starts[:, 1:] |= (here == rules.pad_id) & (before != rules.pad_id)
    # PAD may be the same id as EOS in foreign shards: inside a run of PAD nothing starts.
    starts[:, 1:] &= ~((here == rules.pad_id) & (before == rules.pad_id))
    return starts


def positions(starts: Tensor) -> Tensor:
    """Positions that count from 0 at each True of `starts` and at each row's beginning, `[rows, length] int64`."""
    index = torch.arange(starts.shape[1]).expand_as(starts)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


def longest(input_ids: Tensor, pad_id: int) -> int:
    """The shortest width that holds every token that is not PAD, at least 2 (one prediction)."""
    held = (input_ids != pad_id).any(dim=0).nonzero()
    return max(2, int(held[-1]) + 1) if len(held) else 2


def cut_tokens(batch: dict[str, Any], pad_id: int) -> int:
    """Tokens of unpacked documents that the sequence length parts from their document's beginning.

    They are trained on all the same, as sequences of their own, but without what came before.
    """
    info: StepInfo = batch["info"]
    unpacked = torch.tensor(info.unpacked, dtype=torch.bool)
    if not unpacked.any():
        return 0
    sequences = batch["tokens"].view(-1, info.seq_len)
    per_block = batch["tokens"].shape[1] // info.seq_len
    index = torch.arange(len(sequences))
    here = (index >= info.first_sequence) & (index < info.first_sequence + info.sequences)
    parted = here & unpacked.repeat_interleave(per_block) & (index % per_block > 0)
    return int((sequences[parted] != pad_id).sum())


def real_tokens(batch: dict[str, Any], pad_id: int, streams: int) -> Tensor:
    """Of each of the plan's `streams`: the tokens in this rank's sequences of a step's blocks, `[streams] int64`.

    Padding is none.
    """
    info: StepInfo = batch["info"]
    per_block = batch["tokens"].shape[1] // info.seq_len
    rows = slice(info.first_sequence, info.first_sequence + info.sequences)
    counts = (batch["tokens"].view(-1, info.seq_len)[rows] != pad_id).sum(dim=1)
    numbers = torch.tensor(info.numbers).repeat_interleave(per_block)[rows]
    return torch.zeros(streams, dtype=torch.int64).index_add_(0, numbers, counts)


def trained_tokens(labels: Tensor) -> int:
    """How many predictions `labels [sequences, seq_len]` ask for."""
    return int((labels[:, 1:] != IGNORED).sum())
