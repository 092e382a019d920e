"""The step plan: error bound, arithmetic that inverts, refusals with their remedy."""

from fractions import Fraction
from math import lcm

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chimera.train.order.interleaving import MAX_PERIOD, tijdeman
from chimera.train.order.schedule import Phase, Plan, ScheduleError, Stage, build_plan, proportion

RECIPE = [
    Phase("knowledge", 45_000, {"en": Fraction(55, 100), "it": Fraction(35, 100), "chat": Fraction(10, 100)}, 16),
    Phase("alignment", 5_000, {"en": Fraction(20, 100), "it": Fraction(25, 100), "chat": Fraction(55, 100)}, 16),
]
LENGTHS = [Stage(0, 256), Stage(20_000, 512), Stage(35_000, 1024)]


def shares(weights: dict[str, int]) -> dict[str, Fraction]:
    total = sum(weights.values())
    return {name: Fraction(weight, total) for name, weight in weights.items()}


@st.composite
def plans(draw: st.DrawFn, max_steps: int = 12) -> Plan:
    """Random small plans: rational weights with tiny ones, 1–6 streams, phases, stages, batch sizes, lanes."""
    lanes = draw(st.integers(1, 4))
    block_len = draw(st.sampled_from([8, 12, 16]))
    lengths = st.sampled_from([n for n in range(2, block_len + 1) if block_len % n == 0])
    names = st.sampled_from("abcdef")
    phases = []
    for index in range(draw(st.integers(1, 3))):
        weights = draw(st.dictionaries(names, st.one_of(st.integers(1, 9), st.integers(1, 500)), min_size=1))
        size = draw(st.integers(1, 3)) * block_len * lanes  # fills whole blocks at any length
        phases.append(Phase(f"p{index}", draw(st.integers(1, max_steps)), shares(weights), size))
    starts = sorted({0, *draw(st.lists(st.integers(1, 2 * max_steps), max_size=2))})
    stages = [Stage(start, draw(lengths)) for start in starts]
    return build_plan(phases, stages, draw(st.sampled_from(["sequences", "tokens"])), block_len, lanes)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_every_prefix_of_the_word_is_within_tijdemans_bound(weights: list[int]) -> None:
    period, k = sum(weights), len(weights)
    letters = tijdeman(weights, 2 * period)
    counts = np.stack([np.cumsum(letters == i) for i in range(k)])
    n = np.arange(1, 2 * period + 1)
    worst = np.abs(counts * period - n * np.array(weights)[:, None]).max()  # in 1/period blocks
    assert Fraction(int(worst), period) <= (1 - Fraction(1, 2 * k - 2) if k > 1 else 0)
    assert np.array_equal(letters[:period], letters[period:])  # one period, then the same again


@given(st.lists(st.integers(1, 20), min_size=2, max_size=5))
@settings(max_examples=40, deadline=None)
def test_the_word_is_the_one_of_the_papers_rule(weights: list[int]) -> None:
    """Of the i with n·λ_i − x_i ≥ 1/(2k−2), the one with the least (1 − 1/(2k−2) − n·λ_i + x_i) / λ_i."""
    k, period = len(weights), sum(weights)
    share = [Fraction(w, period) for w in weights]
    edge = Fraction(1, 2 * k - 2)
    counts, word = [0] * k, []
    for n in range(1, period + 1):
        may = [i for i in range(k) if n * share[i] - counts[i] >= edge]
        word.append(min(may, key=lambda i: ((1 - edge - n * share[i] + counts[i]) / share[i], i)))
        counts[word[-1]] += 1
    assert tijdeman(weights, period).tolist() == word


def test_no_rule_can_promise_less_than_tijdemans_bound() -> None:
    """Two equal streams: whichever comes first is off by 1/2 after one block, which is 1 − 1/(2·2 − 2)."""
    plan = build_plan([Phase("p", 2, shares({"a": 1, "b": 1}), 1)], [Stage(0, 8)], "sequences", 8)
    assert abs(plan.blocks_before(1)["a"] - Fraction(1, 2)) == Fraction(1, 2)


def test_the_recipes_word_repeats_after_20_blocks() -> None:
    interleaving = build_plan(RECIPE, LENGTHS, "sequences", 1024).interleavings[0]
    assert interleaving.period == 20
    assert "".join("EIC"[s] for s in interleaving.stream_at) == "EIEIEECIEEIEIEEICEIE"


@given(plans())
@settings(max_examples=60, deadline=None)
def test_each_stream_is_within_one_block_of_its_target_at_every_block_of_every_phase_and_lane(plan: Plan) -> None:
    for index, phase in enumerate(plan.phases):
        segments = [s for s in plan.segments if s.phase == index]
        letters, _ = plan.draws(segments[0].first_step, segments[-1].end_step)
        n = np.arange(1, len(letters) + 1)
        for number, name in enumerate(plan.streams):
            share = phase.proportions.get(name, Fraction(0))
            count = np.cumsum(letters == number)
            off = np.abs(count * share.denominator - n * share.numerator).max()
            assert Fraction(int(off), share.denominator) < 1


@given(plans())
@settings(max_examples=60, deadline=None)
def test_counts_by_arithmetic_are_counts_by_scanning(plan: Plan) -> None:
    counts = dict.fromkeys(plan.streams, 0)
    for step in range(plan.steps):
        assert plan.blocks_before(step) == counts
        letters, positions = plan.draws(step, step + 1)
        for letter, position in zip(letters.tolist(), positions.tolist(), strict=True):
            name = plan.streams[letter]
            assert position == counts[name] // plan.lanes  # positions run on, across steps and phases
            counts[name] += plan.lanes
    assert plan.blocks_before(plan.steps) == counts
    assert sum(counts.values()) == plan.blocks


@given(plans())
@settings(max_examples=60, deadline=None)
def test_step_and_block_and_sequence_arithmetic_inverts(plan: Plan) -> None:
    assert (plan.block_of(0), plan.block_of(plan.steps)) == (0, plan.blocks)
    for step in range(plan.steps):
        segment = plan.segment(step)
        assert segment.first_step <= step < segment.end_step
        assert plan.step_of(plan.block_of(step)) == step == plan.step_of(plan.block_of(step + 1) - 1)
        assert segment.sequences_per_step * segment.seq_len == segment.blocks_per_step * plan.block_len
        assert segment.blocks_per_step % plan.lanes == 0
        assert plan.step_of_sequences(plan.sequences_before(step)) == step
        if segment.sequences_per_step > 1:
            with pytest.raises(ScheduleError, match="do not end at a step"):
                plan.step_of_sequences(plan.sequences_before(step) + 1)
    assert plan.step_of_sequences(plan.sequences_before(plan.steps)) == plan.steps
    with pytest.raises(ScheduleError):
        plan.step_of_sequences(plan.sequences_before(plan.steps) + 1)


def test_the_recipe_cuts_into_its_segments() -> None:
    plan = build_plan(RECIPE, LENGTHS, "sequences", 1024)
    cuts = [(s.phase_name, s.first_step, s.end_step, s.seq_len, s.blocks_per_step) for s in plan.segments]
    assert cuts == [
        ("knowledge", 0, 20_000, 256, 4),
        ("knowledge", 20_000, 35_000, 512, 8),
        ("knowledge", 35_000, 45_000, 1024, 16),
        ("alignment", 45_000, 50_000, 1024, 16),
    ]
    assert plan.positions == 16 * (20_000 * 256 + 15_000 * 512 + 15_000 * 1024)
    assert plan.blocks_before(45_000) == {"en": 198_000, "it": 126_000, "chat": 36_000}


def test_in_mode_tokens_every_step_has_the_tokens_of_the_longest_stage() -> None:
    plan = build_plan(RECIPE, LENGTHS, "tokens", 1024)
    assert [s.sequences_per_step for s in plan.segments] == [64, 32, 16, 16]
    assert {s.blocks_per_step for s in plan.segments} == {16}


def test_a_phase_of_a_thousand_million_steps_costs_nothing() -> None:
    plan = build_plan([Phase("p", 10**9, shares({"a": 55, "b": 35, "c": 10}), 16)], [Stage(0, 8)], "sequences", 8)
    assert plan.blocks_before(10**8) == {"a": 880_000_000, "b": 560_000_000, "c": 160_000_000}
    assert plan.draws(10**8, 10**8 + 1)[1][0] == 880_000_000


def test_the_order_of_streams_in_the_config_changes_no_draw() -> None:
    def names(weights: dict[str, int]) -> list[str]:
        plan = build_plan([Phase("p", 12, shares(weights), 1)], [Stage(0, 8)], "sequences", 8)
        return [plan.streams[s] for s in plan.draws(0, 12)[0]]

    assert names({"a": 1, "b": 1, "c": 1}) == names({"c": 1, "b": 1, "a": 1})


@pytest.mark.parametrize(
    ("value", "exact"), [(0.55, Fraction(11, 20)), ("1/3", Fraction(1, 3)), ("1e-3", Fraction(1, 1000)), (1, 1)]
)
def test_a_proportion_is_the_number_as_written(value: object, exact: Fraction) -> None:
    assert proportion(value) == exact


def plan_with(**changes: object) -> Plan:
    values: dict[str, object] = {
        "proportions": shares({"a": 1}), "steps": 4, "size": 4, "stages": [Stage(0, 8)], "mode": "sequences",
        "lanes": 1, **changes,
    }  # fmt: skip
    phase = Phase("p", values["steps"], values["proportions"], values["size"])
    return build_plan([phase], values["stages"], values["mode"], 8, values["lanes"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proportions": {"a": Fraction("0.5"), "b": Fraction("0.45")}}, r"sum to 0.95 \(-0.05\), not to 1"),
        ({"proportions": {"a": proportion(0.1 + 0.2), "b": Fraction("0.7")}}, r"sum to 1 \(\+\d.*e-17\)"),
        ({"proportions": {"a": Fraction(2), "b": Fraction(-1)}}, "proportion of b is negative"),
        ({"proportions": {"a": Fraction(1, MAX_PERIOD + 1), "b": 1 - Fraction(1, MAX_PERIOD + 1)}, "steps": 10**6},
         f"only after {MAX_PERIOD + 1} blocks"),
        ({"steps": 0}, "0 steps"),
        ({"stages": [Stage(0, 6)]}, "6 tokens do not divide blocks of 8; the nearest that do: 4 and 8"),
        ({"stages": [Stage(0, 12)]}, "12 tokens do not divide blocks of 8; the nearest that do: 8"),
        ({"stages": [Stage(0, 0)]}, "stage from step 0: sequences of 0 tokens train nothing"),
        ({"stages": [Stage(0, 8), Stage(2, 1)]}, "stage from step 2: sequences of 1 tokens .* at least 2 are needed"),
        ({"stages": [Stage(1, 8)]}, "the first must be 0"),
        ({"stages": [Stage(0, 8), Stage(0, 4)]}, "the first must be 0 and each later"),
        ({"stages": [Stage(0, 2)], "size": 7}, "7 sequences of 2 .* global_train_batch_size: 4 or 8"),
        ({"stages": [Stage(0, 2)], "size": 1}, "the nearest global_train_batch_size: 4"),
        ({"lanes": 3}, "in each of 3 lanes; the nearest global_train_batch_size: 3 or 6"),
        ({"lanes": 0}, "0 lanes"),
        ({"mode": "words"}, "one of sequences, tokens"),
    ],
)  # fmt: skip
def test_what_is_not_exact_is_refused_with_the_remedy(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        plan_with(**changes)


def test_two_phases_of_one_name_are_refused() -> None:
    phases = [Phase("p", 4, shares({"a": 1}), 1), Phase("p", 4, shares({"b": 1}), 1)]
    with pytest.raises(ScheduleError, match="phases are named 'p', 'p': each needs a name of its own"):
        build_plan(phases, [Stage(0, 8)], "sequences", 8)


def test_the_sizes_a_refusal_names_work() -> None:
    for size in (3, 6):
        assert plan_with(lanes=3, size=size).blocks == size * 4


def test_ranks_that_do_not_divide_a_step_ahead_are_refused_with_those_that_do() -> None:
    phases = [Phase("first", 4, shares({"a": 1}), 6), Phase("second", 4, shares({"a": 1}), 4)]
    plan = build_plan(phases, [Stage(0, 8)], "sequences", 8)
    plan.check_ranks(2)
    with pytest.raises(ScheduleError, match=r"6 sequences a step in phase first, steps 0 to 3, .* 4 ranks; .*: 1, 2"):
        plan.check_ranks(4)
    plan.check_ranks(4, from_step=4)  # what is behind does not matter
    with pytest.raises(ScheduleError, match=r"phase second, steps 4 to 7, .* 3 ranks; .*: 1, 2, 4"):
        plan.check_ranks(3, from_step=4)


def test_a_long_period_is_fine_in_a_phase_that_ends_before_it() -> None:
    tiny = Fraction(1, 10**30)
    plan = plan_with(proportions={"a": tiny, "b": 1 - tiny})
    assert plan.blocks_before(4)["b"] == 16
    assert lcm(tiny.denominator) > MAX_PERIOD


@pytest.mark.parametrize("value", ["half", "1/0", "nan", "inf", None])
def test_what_is_no_number_is_no_proportion(value: object) -> None:
    with pytest.raises(ScheduleError, match="not a proportion"):
        proportion(value)
