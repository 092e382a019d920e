"""Every figure of plan, steps, report and card on a mix of concat, best_fit and none with masks, by hand arithmetic."""

import hashlib
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chimera.commands import export_hf, plan, report
from chimera.commands.train import main as train
from chimera.manifest import Stream
from chimera.mds import ShardFormat, index_bytes, write_shard
from chimera.train.history.run_files import read_run
from chimera.train.order.run_plan import PARTS, shares_of_blocks
from tests.convert.small_tokenizer import PAD, spec
from tests.train.conftest import steps_of
from tests.train.make_shards import write_manifest

LEN = 16
# Of each stream: its packing, tokens of a block (the rest is padding), and of these how many the assistant says.
STREAMS = {"web": ("concat", 16, None), "chat": ("best_fit", 12, 4), "deaf": ("none", 4, 0)}
CONFIG = """
shards: {root}
cache: {root}/cache
save_folder: {run}
global_train_batch_size: 4
phases:
  - {{name: mixed, steps: 3, proportions: {{web: 0.5, chat: 0.25, deaf: 0.25}}}}
  - {{name: silent, steps: 2, proportions: {{deaf: 1}}}}
  - {{name: again, steps: 1, proportions: {{chat: 0.5, deaf: 0.5}}}}
curriculum: {{stages: [{{from_step: 0, seq_len: 16}}]}}
train_on: assistant
save_interval: 0
max_passes: 9
model: {{model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
  max_position_embeddings: 16}}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    root = tmp_path / "shards"
    ids = {token["content"]: token["id"] for token in json.loads(spec())["added_tokens"]}
    streams: dict[str, Stream] = {}
    for name, (packing, real, said) in STREAMS.items():
        blocks = np.full((8, LEN), ids[PAD], np.uint16)
        blocks[:, :real] = np.arange(real) + 100
        masks = None
        if said is not None:
            masks = np.zeros(blocks.shape, bool)
            masks[:, real - said : real] = True
        folder = root / name / "train"
        folder.mkdir(parents=True)
        form = ShardFormat(LEN, "uint16", masks is not None, None, "xxh3_64", 1 << 25)
        data = index_bytes([write_shard(form, folder, "shard.00000", blocks, masks)])
        (folder / "index.json").write_bytes(data)
        stream = Stream.from_index(hashlib.sha256(data).hexdigest(), 1, 8, LEN, "a test")
        padded = stream.train.model_copy(update={"tokens": 8 * real, "padding": 8 * (LEN - real)})
        streams[name] = stream.model_copy(update={"packing": packing, "train": padded})
    write_manifest(root, streams, LEN)
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG.format(root=root, run=tmp_path / "run"))
    return str(path)


def test_by_hand(config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step of `mixed` has two blocks of web and one of chat and deaf: 32 + 12 + 4 of 64 positions hold a token.

    Of a sequence of web, 15 tokens are predicted; of chat the 4 that the assistant says; of deaf none.
    """
    assert plan.main([config, "--json"]) == 0
    out, err = capsys.readouterr()
    about = json.loads(out)
    assert [(s["tokens"], s["positions"], s["padding"]) for s in about["segments"]] == [
        (3 * 48, 3 * 64, 3 * 16),
        (2 * 16, 2 * 64, 2 * 48),
        (32, 64, 32),
    ]
    assert about["segments"][0]["stream_tokens"] == {"web": 96, "chat": 36, "deaf": 12}
    assert (about["tokens"], about["positions"], about["padding"]) == (208, 384, 176)
    assert {n: (s["tokens"], s["positions"], s["padding"]) for n, s in about["streams"].items()} == {
        "web": (96, 96, 0),
        "chat": (60, 80, 20),
        "deaf": (52, 208, 156),
    }
    assert "phase mixed: deaf is 25.00 % of the positions and 8.33 % of the tokens: 75.00 % of its" in err

    train([config])
    said = capsys.readouterr().err
    assert said.count("warning: step 3 has no token to train on") == 1
    assert "warning: 2 steps without a token to train on" in said
    steps = steps_of(tmp_path / "run")
    assert [(s["tokens"], s["positions"], s["padding"], s["trained"]) for s in steps] == [
        *[(48, 64, 16, 34)] * 3,
        *[(16, 64, 48, 0)] * 2,
        (32, 64, 32, 8),
    ]
    assert steps[0]["stream_tokens"] == {"web": 32, "chat": 12, "deaf": 4}
    assert steps[0]["streams"] == {"web": 32, "chat": 16, "deaf": 16}
    assert [s["loss"] is None for s in steps] == [False, False, False, True, True, False]
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert ["loss/train/total" in line for line in metrics] == [True, True, True, False, False, True]
    assert metrics[-1]["time/token"] == 208

    run = read_run(tmp_path / "run")
    assert (run.tokens, run.positions, run.untrained) == (208, 384, 2)
    losses = [s["loss"] for s in steps]
    assert [stage.mean_loss for stage in run.stages()] == [pytest.approx(sum(losses[:3]) / 3), None, losses[5]]
    assert run.mean_loss(slice(None)) == pytest.approx((34 * sum(losses[:3]) + 8 * losses[5]) / (3 * 34 + 8))
    assert {row.stream: row.of_tokens for row in run.mix() if row.phase == "mixed"} == {
        "web": 2 / 3,
        "chat": 1 / 4,
        "deaf": pytest.approx(1 / 12),
    }
    assert report.main([str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("run chimera: 6 of 6 steps, 208 tokens (45.83 % of 384 positions are padding)\n")
    assert "2 of the steps logged had no token to train on" in said

    export_hf.main([str(tmp_path / "run/latest-rank0.pt"), str(tmp_path / "out")])
    card = (tmp_path / "out/README.md").read_text()
    assert "after 6 steps on 208 tokens, trained with Chimera. Besides, 45.83% of the positions were padding." in card
    assert "| deaf | 52 | 25.00% |" in card


def test_counts_go_on_over_a_resume(config: str, tmp_path: Path) -> None:
    train([config, "max_duration=2ba"])
    train([config, "autoresume=true"])
    assert sum(step["tokens"] for step in steps_of(tmp_path / "run")) == 208
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert metrics[2]["mix/tokens/web"] == 96  # since the phase began, steps before the resume among them
    assert metrics[3]["mix/tokens/deaf"] == 16
    export_hf.main([str(tmp_path / "run/latest-rank0.pt"), str(tmp_path / "out")])
    assert "after 6 steps on 208 tokens" in (tmp_path / "out/README.md").read_text()


def test_shares_of_tokens_are_met_over_whole_passes(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half, a quarter and a quarter of the tokens, of blocks that hold 16, 12 and 4: 3, 2 and 6 of 11 blocks.

    44 blocks are 12 of web, 8 of chat and 24 of deaf: 192, 96 and 96 tokens.
    """
    words = [config, "mix_by=tokens", "phases=[{name: p, steps: 11, proportions: {web: 0.5, chat: 0.25, deaf: 0.25}}]"]
    assert plan.main([*words, "--json"]) == 0
    out, err = capsys.readouterr()
    about = json.loads(out)
    assert {name: stream["tokens"] for name, stream in about["streams"].items()} == {"web": 192, "chat": 96, "deaf": 96}
    assert "of the positions and" not in err
    train(words)
    steps = steps_of(tmp_path / "run")
    for name, tokens in {"web": 192, "chat": 96, "deaf": 96}.items():
        assert sum(step["stream_tokens"][name] for step in steps) == tokens
    run = read_run(tmp_path / "run")
    assert {row.stream: row.of_tokens for row in run.mix()} == {"web": 0.5, "chat": 0.25, "deaf": 0.25}
    assert all(row.worst is not None and row.worst < 1 for row in run.mix())
    assert report.main([str(tmp_path / "run")]) == 0


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.integers(1, 10**9)), min_size=1, max_size=8),
    st.integers(10**9, 10**9 + 99),
)
def test_shares_of_blocks_give_those_of_tokens_within_their_rounding(parts: list[tuple[int, int]], whole: int) -> None:
    total = sum(part for part, _ in parts)
    shares = {str(i): Fraction(part, total) for i, (part, _) in enumerate(parts)}
    held = {str(i): Fraction(tokens, whole) for i, (_, tokens) in enumerate(parts)}
    found = shares_of_blocks(shares, held)
    assert sum(found.values()) == 1
    weights = {name: share / held[name] for name, share in shares.items()}
    for name, weight in weights.items():
        assert abs(found[name] - weight / sum(weights.values())) < Fraction(1, PARTS)
