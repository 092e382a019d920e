"""What a run is given besides its data: rates, speed, gradient clipping, and what a checkpoint keeps of it."""

import json
import math
import time
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.algorithms import GradientClipping
from composer.utils import dist

from chimera.chatml import CHAT_TEMPLATE
from chimera.cli import say
from chimera.manifest import Stream
from chimera.text import duration
from chimera.train.data.proofs import proofs_of
from chimera.train.data.shards import Shards
from chimera.train.data.state import StateMismatch, check_model, check_weights
from chimera.train.run.checkpoint_file import read_checkpoint
from chimera.train.run.checkpoint_schema import Parent
from chimera.train.settings import TrainSettings
from chimera.train.step.base import base_files
from chimera.train.step.model import CausalLM
from chimera.train.step.optimizer import set_group, settle_decay
from chimera.train.step.rotary import frequencies, same_frequencies
from chimera.train.step.schedulers import jump, multiplier
from chimera.versions import with_both_names

SAMPLES = 16  # beginnings of blocks that a checkpoint keeps


def clipping(norm: float | None) -> list[GradientClipping]:
    """Clip the global gradient at `norm`, if given."""
    return [] if norm is None else [GradientClipping(clipping_type="norm", clipping_threshold=norm)]


class SetOptimizer(Callback):
    """Before each step, the learning rate of that step and what else the settings say of the optimizer.

    Composer's schedulers move on before the step is counted, so each step would train with the rate of the one
    before; and a checkpoint brings the optimizer's settings of its own time, over those of the config.

    Args:
        settings: of the run.
        steps: of the whole plan.
    """

    def __init__(self, settings: TrainSettings, steps: int) -> None:
        self.settings, self.steps = settings, steps

    def batch_start(self, state: State, logger: Logger) -> None:
        options = self.settings.optimizer
        share = multiplier(self.settings.scheduler, self.steps, state.timestamp.batch.value)
        for group in (group for optimizer in state.optimizers for group in optimizer.param_groups):
            set_group(group, options, share)


class ProgressLines(Callback):
    """Without a terminal, a line on how far the run is: at its first steps, then at most every `seconds`."""

    def __init__(self, steps: int, seconds: float = 30) -> None:
        self.steps, self.seconds = steps, seconds

    def fit_start(self, state: State, logger: Logger) -> None:
        self.began = self.said = time.monotonic()
        self.first, self.first_tokens = state.timestamp.batch.value, state.timestamp.token.value

    def batch_end(self, state: State, logger: Logger) -> None:
        now, step = time.monotonic(), state.timestamp.batch.value
        if dist.get_global_rank() or (now - self.said < self.seconds and step > self.first + 1 and step < self.steps):
            return
        self.said, took = now, max(1e-9, now - self.began)
        left = duration((self.steps - step) * took / (step - self.first))
        rate = (state.timestamp.token.value - self.first_tokens) / took
        loss = float(state.total_loss_dict["loss/train/total"])
        shown = "nothing to train on" if math.isnan(loss) else f"loss {loss:.3f}"
        say(f"step {step} of {self.steps}: {shown}, {rate:,.0f} tokens/s, {left} left at this rate")


class About(Callback):
    """Keeps in each checkpoint what else the weights were made with.

    `export_hf.py` needs it, so that the one file is enough, and a start compares it with its own (`check`).
    """

    def __init__(
        self,
        model: CausalLM,
        shards: Shards,
        settings: TrainSettings,
        precision: str,
        steps: int,
        parent: Parent | None = None,
    ) -> None:
        base = settings.model.get("pretrained")
        self.weights = set(model.state_dict())
        self.settings = settings
        self.eos_id = shards.tokenizer.eos_id
        self.about: dict[str, Any] = {
            **meaning(model.model.config, shards, settings),
            "bos": list(shards.tokenizer.bos),
            "block_len": shards.block_len,
            "rotary": frequencies(model.model),
            "run_name": settings.run_name,
            "sources": {name: stream.source.model_dump() for name, stream in shards.streams.items()},
            "templates": {name: kept_template(stream) for name, stream in shards.streams.items()},
            "precision": precision,
            "schedule": {**settings.scheduler.model_dump(), "peak": settings.optimizer.lr, "steps": steps},
            "base": base and {"name": Path(base).resolve().name, "files": base_files(base)},
            "proofs": proofs_of(shards, settings.cache),
            "samples": [],
            "parent": parent and parent.model_dump(),
        }

    def check(self, path: Path, own: bool) -> str:
        """Raise `StateMismatch` unless this run may take up the checkpoint at `path` (`own`: of its own folder).

        Returns the `optimizer.weight_decay_on` that it goes on with.
        """
        state = self.read(path, own)
        step = int(state["dataset_state"]["train"]["step"])
        about = state["callbacks"]["About"]["about"]
        options, steps = self.settings, self.about["schedule"]["steps"]
        if (
            step
            and "schedule" in about
            and (words := jump(about["schedule"], options.scheduler, options.optimizer.lr, steps, step))
        ):
            say(f"warning: {words}")
        return settle_decay(self.settings.optimizer, about.get("optimizer", {}), step)

    def read(self, path: Path, own: bool) -> dict[str, Any]:
        """The `state` of the checkpoint at `path`, its tensors read where they are used (`read_checkpoint`).

        Raises `StateMismatch` unless its weights mean in this run's model what they meant (`check_model`).
        """
        state = read_checkpoint(path, lazy=True)
        step = int(state["dataset_state"]["train"]["step"])
        about = state["callbacks"]["About"]["about"]
        check_model(about, self.about, step, own)
        if "rotary" in about and not same_frequencies(about["rotary"], self.about["rotary"]):
            raise StateMismatch(
                f"setting `model`: the rotary frequencies are not those that the checkpoint (step {step}) was trained "
                "with: set the rope settings back, or go on with the version of transformers it was saved with"
            )
        check_weights(state["model"], self.weights, json.loads(about["model_config"]), step)
        return state

    def state_dict(self) -> dict[str, Any]:
        options = self.settings.optimizer
        optimizer = {"name": options.name, "weight_decay_on": options.weight_decay_on}
        return {"about": {**self.about, "optimizer": optimizer}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """This run's own description counts from here on; what it goes on from stays what the weights began with."""
        self.about["base"] = self.about["base"] or state["about"].get("base")

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """Keep the first ids of the first blocks, for the proof of an export; before `Curriculum`, which views them."""
        samples: list[list[int]] = self.about["samples"]
        if len(samples) < SAMPLES:
            blocks = state.batch["tokens"][: SAMPLES - len(samples)].tolist()
            samples += [one_document(block, self.eos_id) for block in blocks]


def meaning(config: Any, shards: Shards, settings: TrainSettings) -> dict[str, Any]:
    """What a checkpoint's weights mean, as `check_model` compares it; `config` is transformers' of the model."""
    return {
        "model_config": json.dumps(with_both_names(json.loads(config.to_json_string(use_diff=False)))),
        "tokenizer": shards.tokenizer.path.read_text(encoding="utf-8"),
        "eos_token": shards.tokenizer.eos_token,
        "pad_token": shards.tokenizer.pad_token,
        "train_on": settings.train_on,
        "document_mask": settings.document_mask,
        "document_ends": shards.tokenizer.document_ends,
    }


def one_document(block: list[int], eos_id: int, most: int = 256) -> list[int]:
    """The first ids of a block, at most up to its first end of a document."""
    return block[: min(most, block.index(eos_id) if eos_id in block else most)]


def kept_template(stream: Stream) -> dict[str, Any] | str | None:
    """The template of a stream of a manifest as a checkpoint keeps it; None: it holds texts."""
    return stream.template.model_dump() if stream.template else CHAT_TEMPLATE if stream.format == "chatml" else None
