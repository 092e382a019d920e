"""The recipe on real text with its real tokenizer, scaled down by config alone: build, phase 1, phase 2, full run.

The data lies beside a checkout of the project (`../shared/data`); without it these tests are skipped.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.conftest import ROOT, steps_of, weights_of

DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="the real data is not here")

BLOCK, PHASES, STAGES = 1024, (8, 4), {0: 256, 3: 512, 6: 1024}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from chimera.commands import build_shards

    output = tmp_path_factory.mktemp("real") / "shards"
    files = {
        "en_cosmopedia": f"{{files: ['{DATA}/cosmopedia-v2/train-00000-of-00004.parquet'], column: text}}",
        "it_culturax": f"{{files: ['{DATA}/culturax-it/it_part_0000[01].parquet'], column: text}}",
        "it_instructions": f"{{files: ['{DATA}/instructions/elleci_instructions.jsonl']}}",
    }
    build_shards.main(
        [
            str(ROOT / "yamls/shards.yaml"),
            *(f"output={output}", f"tokenizer.path={DATA}/tokenizer", "workers=2", "eval_fraction=0.02"),
            *(f"streams.{name}.sources=[{source}]" for name, source in files.items()),
        ]
    )
    return output


def recipe(file: str, shards: Path, folder: Path) -> list[str]:
    stages = ", ".join(f"{{from_step: {step}, seq_len: {length}}}" for step, length in STAGES.items())
    return [
        str(ROOT / "yamls" / file),
        *(f"shards={shards}", f"cache={shards.parent}/cache", f"save_folder={folder}"),
        *(f"phases.{number}.steps={steps}" for number, steps in enumerate(PHASES)),
        *(f"curriculum.stages=[{stages}]", "global_train_batch_size=4"),
        *("model.num_hidden_layers=2", "model.hidden_size=64", "model.intermediate_size=128"),
        *("model.num_attention_heads=2", "model.num_key_value_heads=1"),
        *("scheduler.warmup_steps=3", "scheduler.decay_steps=6", "eval.interval=0", "generate.interval=0"),
    ]


def test_two_files_train_as_one_and_plan_inspect_and_steps_agree(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from chimera.commands import inspect_batch, plan
    from chimera.commands.train import main as train

    def printed(tool: Any, *words: str) -> Any:
        capsys.readouterr()
        run = [*recipe("full.yaml", shards, tmp_path / "full"), f"max_duration={total}ba"]
        tool.main([*run, *words, "--json"])
        return json.loads(capsys.readouterr().out)

    total = sum(PHASES)
    train([*recipe("phase1.yaml", shards, tmp_path / "two"), f"max_duration={PHASES[0]}ba"])
    train([*recipe("phase2.yaml", shards, tmp_path / "two"), f"max_duration={total}ba", f"min_start_step={PHASES[0]}"])
    train([*recipe("full.yaml", shards, tmp_path / "full"), f"max_duration={total}ba"])
    assert (tmp_path / "two/steps.jsonl").read_bytes() == (tmp_path / "full/steps.jsonl").read_bytes()
    ours, theirs = weights_of(tmp_path / "two", total), weights_of(tmp_path / "full", total)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    steps = steps_of(tmp_path / "full")
    assert [line["step"] for line in steps] == list(range(total))
    assert steps[-1]["loss"] < steps[0]["loss"]
    planned = printed(plan)
    realised: Counter[str] = Counter()
    for line in steps:
        seen = printed(inspect_batch, f"step={line['step']}")
        for key in ("step", "phase", "seq_len", "digest"):
            assert seen[key] == line[key]
        assert seen["seq_len"] == [length for step, length in STAGES.items() if step <= line["step"]][-1]
        for block in seen["blocks"]:
            assert block["position"] == realised[block["stream"]]
            assert block["pass"] == block["position"] // manifest_blocks(shards, block["stream"])
            realised[block["stream"]] += 1
        drawn = Counter(block["stream"] for block in seen["blocks"])
        assert {name: drawn[name] * BLOCK for name in line["streams"]} == line["streams"]
        assert line["positions"] == 4 * line["seq_len"]
        for segment in planned["segments"]:
            if segment["last_step"] == line["step"]:
                done = planned["segments"][: planned["segments"].index(segment) + 1]
                assert realised == sum((Counter(s["streams"]) for s in done), Counter())
    assert planned["steps"] == total
    assert planned["positions"] == sum(line["positions"] for line in steps)
    assert {name: stream["blocks"] for name, stream in planned["streams"].items()} == realised


def manifest_blocks(shards: Path, stream: str) -> int:
    return int(json.loads((shards / "manifest.json").read_text())["streams"][stream]["train"]["blocks"])
