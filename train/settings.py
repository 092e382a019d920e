"""Typed settings of a training YAML (`phase*.yaml`), and the step plan they stand for."""

import re
import sys
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera.cli import UserError, load_settings

if TYPE_CHECKING:
    from train.schedule import Plan

FINITE = sys.float_info.max


@dataclass
class PhaseSettings:
    """A span of steps with one mixture."""

    name: str
    steps: int
    proportions: dict[str, Any]  # stream → share: 0.55 or "1/3"; they sum to 1
    global_train_batch_size: int | None = None  # sequences a step; None: the run's


@dataclass
class StageSettings:
    """From this step on, sequences of this length."""

    from_step: int
    seq_len: int


@dataclass
class CurriculumSettings:
    mode: str = "sequences"  # sequences: constant sequences a step | tokens: constant tokens a step
    stages: list[StageSettings] = field(default_factory=list)


@dataclass
class OptimizerSettings:
    """Decoupled AdamW (Loshchilov & Hutter, 2019)."""

    lr: float = 6.0e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1.0e-8
    weight_decay: float = 1.0e-5  # decoupled: not multiplied by the learning rate's peak
    clip_norm: float | None = 1.0  # of the global gradient


@dataclass
class SchedulerSettings:
    """Learning rate over steps; all counts in steps of the whole plan, so that a phase file changes none."""

    name: str = "wsd"  # wsd: warm-up, stable, decay | cosine | constant
    warmup_steps: int = 0
    decay_steps: int = 0  # wsd: the last steps of the plan
    final: float = 0.1  # the end as a share of the peak


@dataclass
class EvalSettings:
    interval: int = 0  # steps; 0: never
    blocks: int = 64  # of each stream's eval split, at most
    seq_lens: list[int] = field(default_factory=list)  # empty: every length of the curriculum


@dataclass
class GenerateSettings:
    interval: int = 0  # steps; 0: never
    prompts: list[str] = field(default_factory=list)
    max_new_tokens: int = 40


@dataclass
class TrainSettings:
    run_name: str = "chimera"
    shards: str = "./data/shards"
    cache: str = "./cache"
    cache_limit: Any = None  # bytes, or "200gb"
    predownload: int = 8  # steps ahead
    num_workers: int = 0
    seed: int = 17
    global_train_batch_size: int = 16
    device_train_microbatch_tokens: Any = "auto"  # tokens a device takes at once | auto
    num_canonical_nodes: int = 1  # lanes
    phases: list[PhaseSettings] = field(default_factory=list)
    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    train_on: str = "all"
    document_mask: bool = True
    max_duration: str | None = None  # "45000ba"; None: the whole plan
    max_passes: float = 4.0  # plan warns past it
    tokens_per_second: float | None = None  # plan's wall-clock
    model: dict[str, Any] = field(default_factory=dict)
    tokenizer: str | None = None  # must be the shards' own; None: theirs
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    scheduler: SchedulerSettings = field(default_factory=SchedulerSettings)
    precision: str = "auto"  # auto: amp_bf16 on a GPU, fp32 on a CPU
    attn_implementation: str = "sdpa"  # sdpa | eager | flex_attention | flash_attention_2
    parallelism: dict[str, Any] = field(default_factory=dict)  # Composer's `parallelism_config`
    activation_checkpointing: bool = False
    compile: bool = False
    liger: bool = False
    save_folder: str = "./runs/{run_name}"
    save_interval: int = 1000  # steps
    save_keep: int = 3  # newest checkpoints kept; -1: all
    load_path: str | None = None  # a checkpoint to start from
    autoresume: bool = False  # go on from the newest complete checkpoint of save_folder
    min_start_step: int = 0  # refuse to start before this step (a later phase in a file of its own)
    eval: EvalSettings = field(default_factory=EvalSettings)
    generate: GenerateSettings = field(default_factory=GenerateSettings)
    loggers: list[str] = field(default_factory=list)  # tensorboard, wandb, mlflow; the file always
    progress_bar: bool = True
    dist_timeout: float = 300.0  # seconds a rank waits for the others


def read_settings(path: Path, overrides: list[str]) -> TrainSettings:
    """The settings of a training YAML, checked one by one; raises `UserError` naming the key."""
    settings = load_settings(TrainSettings, path, overrides)
    choices = {
        "curriculum.mode": (settings.curriculum.mode, ("sequences", "tokens")),
        "train_on": (settings.train_on, ("all", "assistant")),
        "scheduler.name": (settings.scheduler.name, ("wsd", "cosine", "constant")),
        "precision": (settings.precision, ("auto", "fp32", "amp_bf16", "amp_fp16")),
    }
    for key, (value, allowed) in choices.items():
        if value not in allowed:
            raise UserError(f"{path}: setting `{key}` is {value!r}; one of {', '.join(allowed)}")
    if not settings.phases:
        raise UserError(f"{path}: setting `phases` is empty; at least one phase is needed")
    if not settings.curriculum.stages:
        raise UserError(f"{path}: setting `curriculum.stages` is empty; give one {{from_step: 0, seq_len: ...}}")
    microbatch = settings.device_train_microbatch_tokens
    if microbatch != "auto" and (type(microbatch) is not int or microbatch <= 0):
        raise UserError(
            f"{path}: setting `device_train_microbatch_tokens` is {microbatch!r}; tokens as a whole number, or auto"
        )
    for key, (number, least, most) in _ranges(settings).items():
        if number is not None and not least <= number <= most:  # nan is neither
            raise UserError(f"{path}: setting `{key}` is {number}; it is {_in_words(least, most)}")
    for key in ("run_name", "shards", "cache", "save_folder"):
        if not getattr(settings, key):
            raise UserError(f"{path}: setting `{key}` is empty")
    for key in ("shards", "cache", "save_folder", "load_path", "tokenizer"):
        value = getattr(settings, key) or ""
        if value.startswith("~") or "\0" in value:
            raise UserError(f"{path}: setting `{key}`: {value!r} must be a path as it is, without ~ or a NUL")
    if settings.save_keep != -1 and settings.save_keep < 1:
        raise UserError(f"{path}: setting `save_keep` is {settings.save_keep}; at least 1, or -1 for all")
    betas = settings.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"{path}: setting `optimizer.betas` is {betas}; two numbers from 0 to below 1")
    if settings.generate.interval and not all(settings.generate.prompts):
        raise UserError(f"{path}: setting `generate.prompts` holds an empty one; a prompt has at least one character")
    settings.save_folder = settings.save_folder.replace("{run_name}", settings.run_name)
    if "{" in settings.save_folder or "}" in settings.save_folder:
        raise UserError(
            f"{path}: setting `save_folder` is {settings.save_folder!r}; no braces are possible but those of "
            "{run_name}: Composer would fill them in for its own files alone"
        )
    return settings


def _ranges(settings: TrainSettings) -> dict[str, tuple[float | None, float, float]]:
    """Of each number: its value (None: not given), and the least and the most it may be."""
    return {
        "optimizer.lr": (settings.optimizer.lr, 0, FINITE),
        "optimizer.eps": (settings.optimizer.eps, 0, FINITE),
        "optimizer.weight_decay": (settings.optimizer.weight_decay, 0, FINITE),
        "optimizer.clip_norm": (settings.optimizer.clip_norm, 1e-12, inf),
        "scheduler.warmup_steps": (settings.scheduler.warmup_steps, 0, inf),
        "scheduler.decay_steps": (settings.scheduler.decay_steps, 0, inf),
        "scheduler.final": (settings.scheduler.final, 0, 1),
        "seed": (settings.seed, 0, 2**31),
        "num_workers": (settings.num_workers, 0, 1024),
        "predownload": (settings.predownload, 1, inf),
        "save_interval": (settings.save_interval, 0, inf),
        "min_start_step": (settings.min_start_step, 0, inf),
        "max_passes": (settings.max_passes, 0, inf),
        "tokens_per_second": (settings.tokens_per_second, 1e-12, inf),
        "eval.interval": (settings.eval.interval, 0, inf),
        "eval.blocks": (settings.eval.blocks, 1, inf),
        "generate.interval": (settings.generate.interval, 0, inf),
        "generate.max_new_tokens": (settings.generate.max_new_tokens, 1, 2**20),
        "dist_timeout": (settings.dist_timeout, 1, 10**7),
        **{
            f"model.{key}": (value, 0, 1)
            for key, value in settings.model.items()
            if "drop" in key and isinstance(value, int | float)
        },
    }


def _in_words(least: float, most: float) -> str:
    """A range: `at least 0`, `at least 0 and finite`, `above 0`, `from 0 to 1`."""
    low = "above 0" if 0 < least < 1 else f"at least {least}"
    if most >= FINITE:
        return low if most == inf else f"{low} and finite"
    return f"from {least} to {most}"


def plan_of(settings: TrainSettings, block_len: int) -> "Plan":
    """The step plan of `settings` over blocks of `block_len` tokens; raises `UserError` where it has none."""
    from train.schedule import Phase, Stage, build_plan, proportion

    phases = [
        Phase(
            phase.name,
            phase.steps,
            {
                stream: proportion(share, f"setting `phases.{number}.proportions.{stream}`: ")
                for stream, share in phase.proportions.items()
            },
            settings.global_train_batch_size
            if phase.global_train_batch_size is None
            else phase.global_train_batch_size,
        )
        for number, phase in enumerate(settings.phases)
    ]
    stages = [Stage(stage.from_step, stage.seq_len) for stage in settings.curriculum.stages]
    mode, lanes = settings.curriculum.mode, settings.num_canonical_nodes
    return build_plan(phases, stages, mode, block_len=block_len, lanes=lanes)


def end_step(max_duration: str | None, steps: int) -> int:
    """The step training stops before, at most the plan's `steps`; raises `UserError` for another unit."""
    if max_duration is None:
        return steps
    if not (match := re.fullmatch(r"0*([1-9]\d*)ba", str(max_duration).replace("_", ""))):
        raise UserError(f"setting `max_duration` is {max_duration!r}; it is given in steps, at least one, like 45000ba")
    if int(match[1]) > steps:
        raise UserError(f"setting `max_duration` is {max_duration}, but the phases have {steps} steps in all")
    return int(match[1])


def eval_lengths(settings: TrainSettings, plan: "Plan") -> list[int]:
    """The sequence lengths to evaluate at; raises `UserError` for one that does not divide the blocks."""
    lengths = settings.eval.seq_lens or sorted({segment.seq_len for segment in plan.segments})
    for seq_len in lengths:
        if seq_len < 2 or plan.block_len % seq_len:
            raise UserError(
                f"setting `eval.seq_lens`: sequences of {seq_len} tokens do not divide blocks of {plan.block_len}"
            )
    return lengths
