"""A run's batches for a loop of the user's own: what `import chimera` gives of this wing (docs/api.md).

The trainer's own parts put together: its settings, plan and `MixtureDataset`, its labels and position ids. Composer is
not imported.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import TypedDict

from torch import Tensor
from torch.utils.data import IterableDataset

from chimera.cli import UserError
from chimera.train.data.mixture import MixtureDataset
from chimera.train.data.roots import allow_open_files, open_root, plan_with_shards
from chimera.train.order.run_plan import end_step
from chimera.train.order.schedule import Plan
from chimera.train.settings import TrainSettings, read_settings
from chimera.train.step.collate import LabelRules, collate, view_sequences


class Batch(TypedDict):
    """One rank's part of one step. The first three are `[sequences, seq_len] int64`."""

    input_ids: Tensor
    labels: Tensor  # unshifted: position t predicts label t + 1; -100 where no loss is computed
    position_ids: Tensor  # from 0 in each sequence and, with `document_mask`, in each document
    step: int  # of the run, from 0
    phase: str
    digest: str  # of the step's blocks on all ranks, as in steps.jsonl


class Batches(IterableDataset[Batch]):
    """The batches of steps [start, end) on one rank; made by `batches`.

    `len()` of it is their number. Each iteration begins at `start`. In a worker of a `DataLoader` it yields that
    worker's share of the steps, which `DataLoader(..., batch_size=None)` puts in order again.
    """

    def __init__(self, dataset: MixtureDataset, rules: LabelRules, end: int) -> None:
        self.dataset, self.rules, self.end = dataset, rules, end

    def __len__(self) -> int:
        return self.end - self.dataset.start

    def __iter__(self) -> Iterator[Batch]:
        for record in takewhile(lambda record: record["step"] < self.end, self.dataset):
            # As if all streams were packed: of one that is not, the trainer cuts off the padding all rows share.
            views = view_sequences(collate(record, frozenset()), self.rules)
            yield Batch(
                input_ids=views["input_ids"],
                labels=views["labels"],
                position_ids=views["position_ids"],
                step=record["step"],
                phase=record["phase"],
                digest=record["digest"],
            )


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainSettings:
    """The settings of a training YAML with `key=value` overrides; raises `UserError` naming the key."""
    return read_settings(Path(path), list(overrides))


def plan(config: TrainSettings) -> Plan:
    """The step plan of a config; without shards at `config.shards`, in blocks of its longest length.

    Raises `UserError` where no exact plan exists.
    """
    return plan_with_shards(config)[0]


def batches(config: TrainSettings, start: int = 0, rank: int = 0, ranks: int = 1) -> Batches:
    """What rank `rank` of `ranks` trains on from step `start` to the end of the plan, or of `max_duration`.

    Every rank takes an equal slice of each step's sequences, in order. The process may open as many files as the
    system allows from here on: every shard in use is one.

    Raises `UserError` where shards or streams are missing, the config has no exact plan, `ranks` does not divide the
    sequences of a step ahead, or `start` is before `min_start_step` or after the end.
    """
    for name, value, least in (("start", start, 0), ("ranks", ranks, 1), ("rank", rank, 0)):
        if type(value) is not int or value < least:
            raise UserError(f"`{name}` is {value!r}; a whole number, at least {least}")
    if rank >= ranks:
        raise UserError(f"`rank` is {rank} of {ranks} ranks; they are numbered from 0 to {ranks - 1}")
    allow_open_files()
    shards = open_root(config)
    steps = shards.plan(config)
    shards.check(steps.streams)
    shards.check_tokenizer(config.tokenizer)
    end = end_step(config.max_duration, steps.steps)
    if not config.min_start_step <= start <= end:
        raise UserError(
            f"`start` is {start}; this config goes from step {config.min_start_step} (`min_start_step`) to {end} "
            "(`max_duration`, or the end of `phases`): give a step among them"
        )
    steps.check_ranks(ranks, start)
    dataset = MixtureDataset(
        root=config.shards,
        cache=config.cache,
        plan=steps,
        seed=config.seed,
        cache_limit=config.cache_limit,
        predownload=config.predownload,
        rank=rank,
        world_size=ranks,
    )
    dataset.start = start
    return Batches(dataset, LabelRules.of(shards.tokenizer, config), end)
