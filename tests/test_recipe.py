"""The recipe's two halves fit each other: what is built suffices for what is trained, without much to spare."""

from pathlib import Path

from chimera.cli import load_settings
from convert.settings import BuildSettings, check
from train.settings import TrainSettings, plan_of

YAMLS = Path(__file__).resolve().parents[1] / "yamls"


def test_each_text_stream_has_the_tokens_the_schedule_consumes() -> None:
    build = load_settings(BuildSettings, YAMLS / "shards.yaml")
    check(build)
    plan = plan_of(load_settings(TrainSettings, YAMLS / "full.yaml"), build.block_len)
    assert plan.tokens == 450_560_000
    assert set(plan.streams) == set(build.streams)
    consumed = plan.blocks_before(plan.steps)
    for name, stream in build.streams.items():
        if stream.format == "text":
            assert stream.max_tokens is not None
            assert 1.02 < stream.max_tokens / (consumed[name] * build.block_len) < 1.05
    assert build.streams["it_instructions"].max_tokens is None


def test_the_demo_builds_the_recipes_streams() -> None:
    recipe = load_settings(BuildSettings, YAMLS / "shards.yaml")
    demo = load_settings(BuildSettings, YAMLS / "demo" / "shards.yaml")
    check(demo)
    assert {name: s.packing for name, s in demo.streams.items()} == {n: s.packing for n, s in recipe.streams.items()}
    plan = plan_of(load_settings(TrainSettings, YAMLS / "demo" / "phase2.yaml"), demo.block_len)
    assert set(plan.streams) == set(demo.streams)
