"""The recipe's two halves fit each other: what is built suffices for what is trained, without much to spare."""

import json
from pathlib import Path

import pytest

from chimera.commands import build_shards, plan, train, train_tokenizer
from chimera.config import load_settings
from chimera.convert.settings import BuildSettings
from chimera.train.order.run_plan import plan_of
from chimera.train.settings import TrainSettings

ROOT = Path(__file__).resolve().parents[1]
YAMLS = ROOT / "yamls"


def test_each_text_stream_has_the_tokens_the_schedule_consumes() -> None:
    build = load_settings(BuildSettings, YAMLS / "shards.yaml")
    plan = plan_of(load_settings(TrainSettings, YAMLS / "full.yaml"), build.block_len)
    assert plan.positions == 450_560_000
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
    assert {name: s.packing for name, s in demo.streams.items()} == {n: s.packing for n, s in recipe.streams.items()}
    plan = plan_of(load_settings(TrainSettings, YAMLS / "demo" / "phase2.yaml"), demo.block_len)
    assert set(plan.streams) == set(demo.streams)


def test_the_recipe_is_built_planned_and_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own files, on the bundled sample: one layer for a few steps, the rest as it stands there."""
    samples = {"en_cosmopedia": "en_lessons.parquet", "it_culturax": "it_pages.parquet"}
    samples["it_instructions"] = "it_pairs.jsonl"
    shards = [str(YAMLS / "shards.yaml"), f"tokenizer.path={tmp_path}/tokenizer", f"output={tmp_path}/shards"]
    shards += [f"streams.{name}.sources=[{{files: ['{ROOT}/samples/{file}']}}]" for name, file in samples.items()]
    train_tokenizer.main([*shards, "vocab_size=2000"])
    assert build_shards.main([*shards, "workers=1"]) == 0
    where = [f"shards={tmp_path}/shards", f"cache={tmp_path}/cache", f"save_folder={tmp_path}/run"]
    capsys.readouterr()
    assert plan.main([str(YAMLS / "full.yaml"), *where, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 50_000
    assert train.main([str(YAMLS / "full.yaml"), *where, "model.num_hidden_layers=1", "max_duration=3ba"]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/steps.jsonl").read_text().splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
