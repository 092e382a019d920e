"""The order of streams: permutations, no repeats, lanes, locality, keyed by name alone."""

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera.train.order import ordering
from chimera.train.order.ordering import RunOrder, StreamOrder, digest, step_blocks
from chimera.train.order.schedule import Plan
from tests.train.order.test_schedule import plans

sizes = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any)


@pytest.fixture(autouse=True, scope="module")
def _small_windows() -> object:
    """Windows of a few blocks, so that small streams have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ordering, "WINDOW_BLOCKS", 10)
        patch.setattr(ordering, "WINDOW_PIECES", 3)
        yield


def lane_positions(order: StreamOrder, lane: int, pass_: int) -> range:
    """The lane's own numbers of its positions in a pass."""
    first, end = pass_ * order.blocks, (pass_ + 1) * order.blocks
    return range(-((lane - first) // order.lanes), -((lane - end) // order.lanes))


@given(sizes, st.integers(1, 5), st.integers(0, 4), st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_every_pass_is_a_permutation_over_the_lanes(shards: list[int], lanes: int, pass_: int, seed: int) -> None:
    order = StreamOrder("s", shards, seed, lanes)
    parts = []
    for lane in range(lanes):
        span = lane_positions(order, lane, pass_)
        part = order.take(lane, span.start, span.stop)
        assert set(part.tolist()) == set(range(part.min(), part.max() + 1)) if len(part) else True  # one run
        parts.append(part)
    assert sorted(np.concatenate(parts).tolist()) == list(range(sum(shards)))


@given(sizes, st.integers(1, 4), st.data())
@settings(max_examples=60, deadline=None)
def test_any_span_is_a_slice_of_the_whole_order(shards: list[int], lanes: int, data: st.DataObject) -> None:
    order = StreamOrder("s", shards, 1, lanes)
    total = 3 * order.blocks
    whole = order.take(lanes - 1, 0, total)
    first = data.draw(st.integers(0, total))
    end = data.draw(st.integers(first, total))
    fresh = StreamOrder("s", shards, 1, lanes)
    assert np.array_equal(fresh.take(lanes - 1, first, end), whole[first:end])


@given(sizes, st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_a_window_touches_few_shards_and_holds_its_own_blocks(shards: list[int], lanes: int) -> None:
    order = StreamOrder("s", shards, 5, lanes)
    for lane in range(lanes):
        for position in lane_positions(order, lane, 1):
            window = order.window(lane, position)
            assert window.first <= position < window.end
            assert len(window.shards) <= ordering.WINDOW_PIECES
            assert window.end - window.first < ordering.WINDOW_BLOCKS + max(shards)
            blocks = order.take(lane, window.first, window.end)
            assert set(window.shards) == set(order.shard_of(blocks).tolist())


def test_passes_seeds_names_and_lanes_shuffle_differently() -> None:
    def first(name: str = "s", seed: int = 1, lane: int = 0, pass_: int = 0) -> list[int]:
        order = StreamOrder(name, [40, 40], seed, 2)
        span = lane_positions(order, lane, pass_)
        part = order.take(lane, span.start, span.stop)
        return (part - part.min()).tolist()

    orders = [first(), first(name="t"), first(seed=2), first(lane=1), first(pass_=1)]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_of_a_stream_is_pinned() -> None:
    """Replays years later need the very same order: a change of these numbers breaks every checkpoint."""
    order = StreamOrder("it", [4, 3, 5, 2], seed=17, lanes=2)
    assert order.take(0, 0, 14).tolist() == [6, 3, 1, 5, 0, 4, 2, 1, 2, 4, 6, 0, 5, 3]
    assert order.take(1, 0, 14).tolist() == [8, 7, 12, 13, 10, 11, 9, 8, 12, 9, 11, 10, 7, 13]


def test_the_order_with_the_shipped_windows_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ordering, "WINDOW_BLOCKS", 65_536)
    monkeypatch.setattr(ordering, "WINDOW_PIECES", 64)
    blocks = StreamOrder("it", np.full(20, 9000), seed=17, lanes=2).take(1, 0, 100_000)
    assert blocks[:5].tolist() == [162251, 175284, 154519, 162292, 163060]
    assert hashlib.sha256(blocks.astype("<i8").tobytes()).hexdigest()[:16] == "8e2415f1aa022b06"


def test_two_lanes_share_only_the_shard_at_their_border() -> None:
    order = StreamOrder("s", [10] * 12, 3, lanes=4)
    for pass_ in range(3):
        touched = []
        for lane in range(4):
            span = lane_positions(order, lane, pass_)
            touched.append(set(order.shard_of(order.take(lane, span.start, span.stop)).tolist()))
        assert all(not a & b for i, a in enumerate(touched) for b in touched[i + 1 :])  # 12 shards over 4 lanes


@st.composite
def runs(draw: st.DrawFn) -> RunOrder:
    plan = draw(plans())
    return RunOrder(plan, {name: draw(sizes) for name in plan.streams}, seed=draw(st.integers(0, 9)))


@given(runs())
@settings(max_examples=60, deadline=None)
def test_no_block_comes_twice_before_its_stream_is_exhausted_across_phases_and_lanes(order: RunOrder) -> None:
    plan = order.plan
    seen: Counter[tuple[str, int]] = Counter()
    for step in range(plan.steps):
        seen.update((ref.stream, ref.block) for ref in step_blocks(order, step))
        for name, consumed in plan.blocks_before(step + 1).items():
            blocks = order.streams[name].blocks
            times = [seen[name, block] for block in range(blocks)]
            assert set(times) <= {consumed // blocks, -(-consumed // blocks)}
            assert sum(times) == consumed


@given(runs())
@settings(max_examples=60, deadline=None)
def test_a_step_is_what_the_plan_says_however_it_is_asked_for(order: RunOrder) -> None:
    plan = order.plan
    running = dict.fromkeys(plan.streams, 0)
    for segment in plan.segments:
        together = order.steps(segment.first_step, segment.end_step)
        for step in range(segment.first_step, segment.end_step):
            refs = step_blocks(order, step)
            row = step - segment.first_step
            assert len(refs) == segment.blocks_per_step
            assert [plan.streams[s] for s in together.streams[row]] == [ref.stream for ref in refs]
            assert together.blocks[row].tolist() == [ref.block for ref in refs]
            for name in plan.streams:
                positions = sorted(ref.position for ref in refs if ref.stream == name)
                assert positions == list(range(running[name], running[name] + len(positions)))
                running[name] += len(positions)
            for ref in refs:
                stream = order.streams[ref.stream]
                assert ref.pass_ == ref.position // stream.blocks
                assert stream.shard_starts[ref.shard] <= ref.block < stream.shard_starts[ref.shard + 1]


@given(plans())
@settings(max_examples=30, deadline=None)
def test_another_stream_does_not_change_this_ones_order(plan: Plan) -> None:
    name = plan.streams[0]
    alone = StreamOrder(name, [7, 5], 17, plan.lanes)
    among = RunOrder(plan, {key: [7, 5] for key in plan.streams}, 17).streams[name]
    assert np.array_equal(alone.take(0, 0, 30), among.take(0, 0, 30))


def test_a_position_far_out_is_found_at_once() -> None:
    order = StreamOrder("s", np.full(305, 32_768), 17)
    blocks = order.take(0, 10**12, 10**12 + 16)
    assert len(set(blocks.tolist())) == 16


def test_the_kind_of_the_numbers_asked_with_changes_nothing() -> None:
    """A key made of `np.int64(3)` would differ from one made of `3`, and between versions of numpy."""
    plain, numpy = StreamOrder("s", [9, 9], 1), StreamOrder("s", np.array([9, 9]), np.int64(1))
    assert np.array_equal(plain.take(0, 20, 50), numpy.take(np.int64(0), np.int64(20), np.int64(50)))


def test_the_digest_is_of_streams_and_blocks_in_order() -> None:
    assert digest([("a", 1), ("b", 2)]) == "2c46d45ee51a5c678b52a43903634f16"
    assert len({digest(x) for x in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)], [("a", 12)], [("a", 1)])}) == 4


def test_a_stream_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="no blocks"):
        StreamOrder("s", [0, 0], 1)
