"""Real shards from the bundled sample, built once a test process, and runs of the real trainer on them."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def demo_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's three streams in blocks of 128 tokens."""
    from chimera.commands import build_shards, train_tokenizer

    folder = tmp_path_factory.mktemp("demo")
    sources = {
        "en_cosmopedia": "en_lessons.parquet",
        "it_culturax": "it_pages.parquet",
        "it_instructions": "it_pairs.jsonl",
    }
    config = [str(ROOT / "yamls/demo/shards.yaml"), f"tokenizer.path={folder}/tokenizer", f"output={folder}/shards"]
    config += [f"streams.{name}.sources=[{{files: ['{ROOT}/samples/{file}']}}]" for name, file in sources.items()]
    train_tokenizer.main(config)
    build_shards.main([*config, "workers=1"])
    return folder / "shards"


# 30 steps in two phases and three stages, a model of a few thousand parameters, and dropout, so that a lost random
# state would show.
SMALL = [
    "phases=[{name: knowledge, steps: 20, proportions: {en_cosmopedia: 0.55, it_culturax: 0.35, it_instructions: 0.1}},"
    " {name: alignment, steps: 10, proportions: {en_cosmopedia: 0.2, it_culturax: 0.25, it_instructions: 0.55}}]",
    "curriculum.stages=[{from_step: 0, seq_len: 32}, {from_step: 8, seq_len: 64}, {from_step: 16, seq_len: 128}]",
    "model={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2,"
    " attention_dropout: 0.1, max_position_embeddings: 128}",
    "scheduler={name: wsd, warmup_steps: 3, decay_steps: 10, final: 0.1}",
    "save_interval=5",
    "save_keep=-1",
    "eval.interval=0",
    "generate.interval=0",
]


@pytest.fixture
def overrides(demo_shards: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Overrides of yamls/demo/base.yaml for a small run in `tmp_path/NAME`."""

    def make(name: str, *more: str) -> list[str]:
        where = [f"shards={demo_shards}", f"cache={demo_shards.parent}/cache", f"save_folder={tmp_path}/{name}"]
        return [str(ROOT / "yamls/demo/base.yaml"), *SMALL, *where, *more]

    return make


@contextlib.contextmanager
def flex_uncompiled() -> Iterator[None]:
    """Flex attention runs and trains on a CPU: torch compiles it there for inference alone, if at all."""
    import torch
    from torch.nn.attention import flex_attention

    flag = "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):
        patch.setattr(flex_attention, flag, True, raising=False)  # what torch 2.9 and later ask beside Dynamo's
        patch.setattr(flex_attention, "_validate_device", lambda *_: None)
        yield


def rewrite(manifest: Path, before: str, after: str) -> None:
    """Replace text in a manifest, and leave out its hash, which is of the whole."""
    value = json.loads(manifest.read_text().replace(before, after))
    del value["sha256"]
    manifest.write_text(json.dumps(value))


def forget_trackers() -> None:
    """Let go what MLflow and W&B keep in a process of an earlier run, which counts more than the environment."""
    import mlflow
    import wandb

    mlflow.set_tracking_uri(None)  # type: ignore[arg-type]  # as its own code takes it
    wandb.teardown()


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def weights_of(folder: Path, step: int) -> dict[str, Any]:
    from chimera.train.run.checkpoint_file import read_checkpoint

    return read_checkpoint(folder / f"ep0-ba{step}-rank0.pt")["model"]
