"""What a run is given besides its data: loggers, speed, gradient clipping - Composer's own, chosen by settings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composer import Callback
from composer.algorithms import GradientClipping
from composer.callbacks import LRMonitor, SpeedMonitor
from composer.loggers import LoggerDestination

from chimera.cli import UserError
from train.model import CausalLM
from train.monitor import MetricsFile
from train.settings import TrainSettings
from train.shards import Shards

EXTRAS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


def loggers(settings: TrainSettings, folder: Path) -> list[LoggerDestination]:
    """`metrics.jsonl` always, and those named in `loggers`; raises `UserError` for one not known or installed."""
    chosen: list[LoggerDestination] = [MetricsFile(folder)]
    for name in settings.loggers:
        if name == "file":
            continue
        if name not in EXTRAS:
            raise UserError(f"setting `loggers` names {name!r}; known are file, {', '.join(EXTRAS)}")
        chosen.append(_tracker(name, settings, folder))
    return chosen


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


def speed(model: CausalLM, on_gpu: bool) -> Sequence[Callback]:
    """Throughput (and on a GPU model flops utilisation), and the learning rate.

    Flops a token are 6 for each parameter plus 12 · layers · hidden · seq_len for attention (Chowdhery et al.,
    "PaLM", 2022, appendix B).
    """
    config = model.model.config
    parameters = sum(p.numel() for p in model.parameters())
    layers, hidden = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)

    def flops_per_batch(batch: dict[str, Any]) -> float:
        sequences, length = batch["input_ids"].shape
        return sequences * length * (6 * parameters + 12 * layers * hidden * length)

    if on_gpu:
        model.flops_per_batch = flops_per_batch  # what SpeedMonitor looks for
    return [SpeedMonitor(window_size=10), LRMonitor()]


def clipping(norm: float | None) -> list[GradientClipping]:
    """Clip the global gradient at `norm`, if given."""
    return [] if norm is None else [GradientClipping(clipping_type="norm", clipping_threshold=norm)]


class About(Callback):
    """Keeps in each checkpoint what `export_hf.py` needs besides the weights, so that the one file is enough."""

    def __init__(self, model: CausalLM, shards: Shards, settings: TrainSettings) -> None:
        self.about = {
            "model_config": model.model.config.to_json_string(use_diff=False),
            "tokenizer": shards.tokenizer.path.read_text(encoding="utf-8"),
            "eos_token": shards.tokenizer.eos_token,
            "pad_token": shards.tokenizer.pad_token,
            "block_len": shards.block_len,
            "run_name": settings.run_name,
            "sources": {name: stream.get("source") for name, stream in shards.streams.items()},
        }

    def state_dict(self) -> dict[str, Any]:
        return {"about": self.about}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing: this run's own description counts from here on."""
