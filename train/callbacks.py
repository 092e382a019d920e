"""What a run is given besides its data: loggers, speed, gradient clipping - Composer's own, chosen by settings."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from composer import Callback, Logger, State
from composer.algorithms import GradientClipping
from composer.loggers import LoggerDestination
from composer.utils import dist

from chimera.cli import UserError, say
from train.model import CausalLM
from train.monitor import MetricsFile
from train.schedulers import multiplier
from train.settings import TrainSettings
from train.shards import Shards
from train.state import check_model

EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def loggers(settings: TrainSettings, folder: Path) -> list[LoggerDestination]:
    """`metrics.jsonl` always, and those named in `loggers`; raises `UserError` for one not known or installed."""
    chosen: list[LoggerDestination] = [MetricsFile(folder)]
    for name in settings.loggers:
        if name == "file":
            continue
        if name not in EXTRAS:
            raise UserError(f"setting `loggers` names {name!r}; known are file, {', '.join(EXTRAS)}")
        chosen.append(_name_by_start(_tracker(name, settings, folder), folder))
    return chosen


def _name_by_start(logger: LoggerDestination, folder: Path) -> LoggerDestination:
    """Have a tracker keep what each start was made of as `start_0/…`, `start_1/…`.

    A run resumed with another setting or rank count changes it, which trackers refuse; MLflow 3 then drops the
    metrics sent with it.
    """
    starts = folder / "starts.jsonl"
    number = len(starts.read_text().splitlines()) if starts.exists() else 0
    log = logger.log_hyperparameters

    def log_of_this_start(hyperparameters: dict[str, Any]) -> None:
        log({f"start_{number}/{key}": value for key, value in hyperparameters.items()})

    logger.log_hyperparameters = log_of_this_start
    return logger


def _tracker(name: str, settings: TrainSettings, folder: Path) -> LoggerDestination:
    from importlib.util import find_spec

    if find_spec(EXTRAS[name]) is None:
        raise UserError(f"logger {name} is not installed: pip install -c constraints.txt -e '.[tracking]'")
    if name == "tensorboard":
        from composer.loggers import TensorboardLogger

        return TensorboardLogger(log_dir=str(folder / "tensorboard"))
    if name == "wandb":
        from composer.loggers import WandBLogger

        # one name, one run: a resumed run goes on in the same curves
        return WandBLogger(name=settings.run_name, init_kwargs={"id": settings.run_name, "resume": "allow"})
    from composer.loggers import MLFlowLogger

    return MLFlowLogger(experiment_name=settings.run_name, run_name=settings.run_name, resume=True)


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
            group["lr"] = share * options.lr
            group["initial_lr"] = options.lr  # DecoupledAdamW decays weights by lr / initial_lr
            group["betas"], group["eps"] = tuple(options.betas), options.eps
            group["weight_decay"] = options.weight_decay


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
        left = timedelta(seconds=round((self.steps - step) * took / (step - self.first)))
        rate = (state.timestamp.token.value - self.first_tokens) / took
        loss = float(state.total_loss_dict["loss/train/total"])
        say(f"step {step} of {self.steps}: loss {loss:.3f}, {rate:,.0f} tokens/s, {left} left at this rate")


class About(Callback):
    """Keeps in each checkpoint what else the weights were made with.

    `export_hf.py` needs it, so that the one file is enough, and a start compares it with its own (`check`).
    """

    def __init__(self, model: CausalLM, shards: Shards, settings: TrainSettings) -> None:
        self.about = {
            "model_config": model.model.config.to_json_string(use_diff=False),
            "tokenizer": shards.tokenizer.path.read_text(encoding="utf-8"),
            "eos_token": shards.tokenizer.eos_token,
            "pad_token": shards.tokenizer.pad_token,
            "block_len": shards.block_len,
            "run_name": settings.run_name,
            "train_on": settings.train_on,
            "document_mask": settings.document_mask,
            "sources": {name: stream.get("source") for name, stream in shards.streams.items()},
        }

    def check(self, path: Path, own: bool) -> None:
        """Raise `StateMismatch` unless this run may take up the checkpoint at `path` (`own`: of its own folder)."""
        from train.export_hf import read_checkpoint

        state = read_checkpoint(path, lazy=True)
        step = int(state["dataset_state"]["train"]["step"])
        check_model(state["callbacks"]["About"]["about"], self.about, step, own)

    def state_dict(self) -> dict[str, Any]:
        return {"about": self.about}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: this run's own description counts from here on."""
