"""MixtureDataset: the same global batches on any ranks and workers, from any step, and what it refuses."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streaming import StreamingDataset
from torch.utils.data import DataLoader

from chimera.cli import UserError
from chimera.train.data.mixture import MixtureDataset
from chimera.train.data.places import Places
from chimera.train.data.state import StateMismatch
from chimera.train.order.ordering import digest, step_blocks
from chimera.train.order.schedule import Plan
from tests.train.make_shards import BLOCK_LEN, block_mask, block_tokens, make_shards, plan_for

STREAMS = {"en": [9, 7, 8, 5], "it": [6, 6, 2], "chat": [3, 1]}
# two phases, the lengths change inside each: segments of 3, 4, 3 and 12 blocks a step
PLAN = plan_for([(10, {"en": 55, "it": 35, "chat": 10}), (8, {"en": 4, "it": 5, "chat": 11})], {0: 4, 6: 8, 14: 16})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("root"), STREAMS, masked=["chat"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def dataset(root: Places | Path, cache: Path, plan: Plan = PLAN, **changes: Any) -> MixtureDataset:
    return MixtureDataset(
        root=str(root) if isinstance(root, Path) else root, cache=str(cache), plan=plan, **{"seed": 17, **changes}
    )


def loader(data: MixtureDataset, workers: int) -> Iterator[dict[str, Any]]:
    return iter(DataLoader(data, batch_size=None, collate_fn=lambda record: record, num_workers=workers))


def sequences(record: dict[str, Any]) -> np.ndarray:
    """A rank's sequences of a step, [sequences, seq_len]."""
    first = record["first_sequence"]
    return record["tokens"].reshape(-1, record["seq_len"])[first : first + record["sequences"]]


def global_batches(
    root: Places | Path, cache: Path, ranks: int, workers: int, start: int = 0, plan: Plan = PLAN
) -> list:
    """(step, digest, the global batch's tokens) of every step from `start`, put together from all ranks."""
    state = dataset(root, cache, plan).state_dict(plan.sequences_before(start), True)
    iterators = []
    for rank in range(ranks):
        data = dataset(root, cache, plan, rank=rank, world_size=ranks)
        data.load_state_dict(state)
        iterators.append(loader(data, workers))
    batches = []
    for records in itertools.zip_longest(*iterators):
        assert len({(record["step"], record["digest"]) for record in records}) == 1
        whole = np.concatenate([sequences(record) for record in records])
        batches.append((records[0]["step"], records[0]["digest"], whole.tolist()))
    return batches


@pytest.fixture(scope="module")
def expected(root: Path, cache: Path) -> list:
    """The run as arithmetic says it, without a dataset's iteration."""
    order = dataset(root, cache).order
    batches = []
    for step in range(PLAN.steps):
        refs = step_blocks(order, step)
        tokens = np.concatenate([block_tokens(ref.stream, ref.block) for ref in refs])
        batches.append(
            (
                step,
                digest((ref.stream, ref.block) for ref in refs),
                tokens.reshape(-1, PLAN.segment(step).seq_len).tolist(),
            )
        )
    return batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 1, 2, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_any_number_of_ranks_and_workers_sees_the_same_global_batches(
    root: Path, cache: Path, expected: list, ranks: int, workers: int
) -> None:
    assert global_batches(root, cache, ranks, workers) == expected


@pytest.mark.parametrize("start", [0, 1, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17])
def test_a_resume_at_any_step_goes_on_with_the_same_batches(
    root: Path, cache: Path, expected: list, start: int
) -> None:
    """First, last, and on, before and after each change of phase (10) and length (6, 14)."""
    assert global_batches(root, cache, 2, 0, start) == expected[start:]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_chain_of_resumes_on_another_topology_each_time_is_the_uninterrupted_run(
    root: Path, cache: Path, expected: list
) -> None:
    seen: list = []
    for stop, ranks, workers in [(2, 1, 0), (6, 2, 2), (7, 4, 0), (13, 3, 1), (18, 1, 8)]:
        seen += global_batches(root, cache, ranks, workers, len(seen))[: stop - len(seen)]
    assert seen == expected


def test_a_finished_run_has_nothing_left(root: Path, cache: Path) -> None:
    assert global_batches(root, cache, 1, 0, start=PLAN.steps) == []


def test_records_say_what_they_hold(root: Path, cache: Path) -> None:
    data = dataset(root, cache)
    assert isinstance(data, StreamingDataset)
    running = dict.fromkeys(PLAN.streams, 0)
    for record in data:
        segment = PLAN.segment(record["step"])
        assert (record["phase"], record["seq_len"]) == (segment.phase_name, segment.seq_len)
        assert sum(record["streams"].values()) == segment.blocks_per_step * BLOCK_LEN
        blocks = [(PLAN.streams[s], int(b)) for s, b in zip(record["stream"], record["block"], strict=True)]
        assert record["digest"] == digest(blocks)
        for tokens, said, (stream, block) in zip(record["tokens"], record["assistant"], blocks, strict=True):
            assert np.array_equal(tokens, block_tokens(stream, block))
            assert np.array_equal(said, block_mask(block) if stream == "chat" else np.ones(BLOCK_LEN, bool))
            running[stream] += 1
        assert PLAN.blocks_before(record["step"] + 1) == running
    assert sum(running.values()) == PLAN.blocks


def test_streams_without_masks_give_none(root: Path, cache: Path) -> None:
    record = next(iter(dataset(root, cache, plan_for([(2, {"en": 1, "it": 1})]))))
    assert record["assistant"] is None


def test_lanes_are_laid_out_one_after_another(root: Path, cache: Path) -> None:
    plan = plan_for([(20, {"en": 1, "it": 1})], lanes=4)
    batches = global_batches(root, cache, 1, 0, plan=plan)
    assert global_batches(root, cache, 4, 2, plan=plan) == batches
    record = next(iter(dataset(root, cache, plan, rank=1, world_size=4)))
    en = record["block"][record["stream"] == plan.streams.index("en")]
    assert all(29 // 4 <= block <= 29 // 2 for block in en)  # the second quarter of the stream's blocks


def test_ranks_that_do_not_divide_are_refused_before_the_first_step(root: Path, cache: Path) -> None:
    with pytest.raises(UserError, match=r"12 sequences .* 5 ranks; .*: 1, 2, 3, 4, 6, 12"):
        next(iter(dataset(root, cache, rank=0, world_size=5)))


def test_composers_and_the_loaders_count_give_the_same_state(root: Path, cache: Path) -> None:
    data = dataset(root, cache)
    whole = data.state_dict(PLAN.sequences_before(13), True)
    data.load_state_dict(data.state_dict(PLAN.sequences_before(7), True))
    assert data.state_dict(PLAN.sequences_before(13) - PLAN.sequences_before(7), False) == whole
    assert (whole["step"], whole["block_cursor"]) == (13, PLAN.block_of(13))
    assert whole["consumed"] == PLAN.blocks_before(13)


def changed(**changes: Any) -> Plan:
    settings: dict[str, Any] = {"lengths": {0: 4, 6: 8, 14: 16}, **changes}
    phases = settings.pop("phases", [(10, {"en": 55, "it": 35, "chat": 10}), (8, {"en": 4, "it": 5, "chat": 11})])
    return plan_for(phases, **settings)


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (changed(), {"seed": 18}, r"setting `seed` is 18, the checkpoint \(step 12\) was trained with 17"),
        (changed(lengths={0: 4, 6: 4, 14: 16}), {}, r"the sequence length at step 6 is 4, .* trained with 8"),
        (changed(lengths={0: 4, 5: 8, 14: 16}), {}, r"changes mixture or length at step 5, .* at step 6"),
        (changed(batch=24), {}, r"`global_train_batch_size`: sequences a step at step 0 is 24, .* with 12"),
        (changed(lanes=3, lengths={0: 16}), {}, r"`num_canonical_nodes` is 3, .* trained with 1"),
        (changed(phases=[(10, {"en": 55, "it": 35, "chat": 10}), (8, {"en": 5, "it": 5, "chat": 10})]), {},
         r"the proportions at step 10 is chat 1/2, en 1/4, it 1/4, .* with chat 11/20, en 1/5, it 1/4"),
        (changed(phases=[(11, {"en": 55, "it": 35, "chat": 10})]), {}, r"past the config's 11 steps"),
        (changed(phases=[(9, {"en": 55, "it": 35, "chat": 10}), (9, {"en": 4, "it": 5, "chat": 11})]), {},
         r"changes mixture or length at step 9, .* at step 10"),
    ],
)  # fmt: skip
def test_another_history_is_refused_naming_both_values(
    root: Path, cache: Path, plan: Plan, options: dict[str, Any], message: str
) -> None:
    state = dataset(root, cache).state_dict(PLAN.sequences_before(12), True)
    with pytest.raises(StateMismatch, match=message):
        dataset(root, cache, plan, **options).load_state_dict(state)


def test_the_same_mixture_cut_into_two_phases_is_another_history(root: Path, cache: Path) -> None:
    mix = {"en": 55, "it": 35, "chat": 10}
    state = dataset(root, cache, plan_for([(10, mix)])).state_dict(12 * 8, True)
    with pytest.raises(StateMismatch, match="changes mixture or length at step 5"):
        dataset(root, cache, plan_for([(5, mix), (5, mix)])).load_state_dict(state)


def test_the_future_may_be_edited(root: Path, cache: Path) -> None:
    state = dataset(root, cache).state_dict(PLAN.sequences_before(10), True)
    phases = [(10, {"en": 55, "it": 35, "chat": 10}), (3, {"it": 1}), (90, {"en": 1, "chat": 1})]
    data = dataset(root, cache, changed(phases=phases, lengths={0: 4, 6: 8, 10: 16, 12: 4}))
    data.load_state_dict(state)
    record = next(iter(data))
    assert (record["step"], record["seq_len"], set(record["stream"].tolist())) == (10, 16, {1})


def test_a_stream_built_again_is_refused_once_it_was_trained_on(root: Path, cache: Path, tmp_path: Path) -> None:
    other = make_shards(tmp_path / "other", {**STREAMS, "it": [6, 6, 3]}, masked=["chat"])
    plan = plan_for([(5, {"en": 1}), (5, {"it": 1})])
    before, after = (dataset(root, cache, plan).state_dict(12 * step, True) for step in (5, 6))
    dataset(other, cache, plan).load_state_dict(before)  # `it` is still to come: it may change
    with pytest.raises(StateMismatch, match=r"stream it: its shards' index is \w+, .* trained on 12 blocks of \w+"):
        dataset(other, cache, plan).load_state_dict(after)


@pytest.mark.parametrize("state", [None, {}, {"epoch": 0, "sample_in_epoch": 4}])
def test_a_state_of_something_else_is_refused(root: Path, cache: Path, state: Any) -> None:
    with pytest.raises(StateMismatch, match="no state of this data"):
        dataset(root, cache).load_state_dict(state)


def test_a_state_of_another_version_is_refused(root: Path, cache: Path) -> None:
    state = dataset(root, cache).state_dict(0, True)
    with pytest.raises(StateMismatch, match="version 99, this program reads 1"):
        dataset(root, cache).load_state_dict({**state, "version": 99})


def test_random_access_reads_blocks_by_number(root: Path, cache: Path) -> None:
    tokens, masks = dataset(root, cache).read_blocks("chat", np.array([3, 0]))
    assert np.array_equal(tokens, np.stack([block_tokens("chat", block) for block in (3, 0)]))
    assert np.array_equal(masks, np.stack([block_mask(block) for block in (3, 0)]))
