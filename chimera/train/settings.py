"""Typed settings of a training YAML (`phase*.yaml`); docs/settings.md is made from the fields."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, WithJsonSchema, field_validator, model_serializer, model_validator

from chimera.config import Bytes, Place, Settings, Switch, load_settings
from chimera.text import neutral


def _run_name(name: str) -> str:
    """It names a folder, and in trackers a run; a file's name has at most 255 bytes."""
    if re.search(r"^[\s.~-]|[/\\\t\n]", name) or neutral(name) != name or len(name.encode()) > 200:
        raise ValueError(
            "a name of at most 200 bytes, and no path: without /, \\ and characters that are not seen, and beginning "
            "with neither a space nor one of . ~ -"
        )
    return name


Share = Annotated[int | float | str, WithJsonSchema({"type": "share"})]
Text = Annotated[str, Field(min_length=1)]
Root = Annotated[Place, Field(min_length=1)]


class PhaseSettings(Settings):
    """A span of steps with one mixture."""

    name: str = Field(description="its name, in the plan and in steps.jsonl")
    steps: int = Field(ge=1, description="its number of steps")
    proportions: dict[str, Share] = Field(description='by stream, of what `mix_by` says: 0.55 or "1/3"; they sum to 1')
    global_train_batch_size: int | None = Field(None, ge=1, description="sequences a step; null: the run's")


class StageSettings(Settings):
    """From this step on, sequences of this length."""

    from_step: int = Field(ge=0, description="the step it begins at; the first stage's is 0")
    seq_len: int = Field(ge=1, description="tokens of a sequence; a divisor of the shards' `block_len`")


class CurriculumSettings(Settings):
    mode: Literal["sequences", "tokens"] = Field(
        "sequences", description="what is the same at every step: its number of sequences, or of tokens"
    )
    stages: list[StageSettings] = Field([], min_length=1, description="lengths by step, `{from_step: 0, seq_len: ...}`")


def _betas(betas: list[float]) -> list[float]:
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError("two numbers from 0 to below 1")
    return betas


class OptimizerSettings(Settings):
    """Decoupled AdamW (Loshchilov & Hutter, 2019), or Muon for matrices beside it."""

    name: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices of hidden layers, with AdamW for the rest; torch 2.9 or later"
    )
    lr: float = Field(6.0e-4, ge=0, allow_inf_nan=False, description="the peak; Muon's steps have the size of AdamW's")
    betas: Annotated[list[float], AfterValidator(_betas)] = Field([0.9, 0.95], description="AdamW's; each below 1")
    eps: float = Field(1.0e-8, ge=0, allow_inf_nan=False, description="AdamW's, beside the root of the second moment")
    weight_decay: float = Field(
        1.0e-5, ge=0, allow_inf_nan=False, description="decoupled: not multiplied by the learning rate's peak"
    )
    weight_decay_on: Literal["matrices", "all"] | None = Field(
        None, description="matrices: not biases, norms and embeddings; null: the checkpoint's, matrices in a new run"
    )
    clip_norm: float | None = Field(1.0, gt=0, description="of the global gradient, at most; null: not clipped")


class SchedulerSettings(Settings):
    """Learning rate over steps; all counts in steps of the whole plan, so that a phase file changes none."""

    name: Literal["wsd", "cosine", "constant"] = Field("wsd", description="wsd: warm-up, stable, decay")
    warmup_steps: int = Field(0, ge=0, description="the first steps, from 0 to the peak")
    decay_steps: int = Field(0, ge=0, description="wsd: the last steps of the plan")
    decay: Literal["linear", "cosine", "sqrt"] = Field("linear", description="wsd: the shape of its decay")
    final: float = Field(0.1, ge=0, le=1, description="the end as a share of the peak")


class EvalSettings(Settings):
    interval: int = Field(0, ge=0, description="steps; 0: never")
    streams: list[Text] | None = Field(
        None, description="whose eval splits, also of streams that no phase trains on; null: all that phases train on"
    )
    blocks: int = Field(64, ge=1, description="of each stream's eval split, at most")
    seq_lens: list[int] = Field([], description="tokens of a sequence; none given: every length of the curriculum")


class GenerateSettings(Settings):
    interval: int = Field(0, ge=0, description="steps; 0: never")
    prompts: list[Text] = Field([], description="texts to go on from, none of them empty")
    max_new_tokens: int = Field(40, ge=1, le=1 << 20, description="of each continuation, at most")


class BranchSettings(Settings):
    """The checkpoint of another run that this one begins with."""

    origin: Root = Field(alias="from", description="a run's `save_folder`, here or in a store, or one checkpoint of it")
    step: int | None = Field(None, ge=1, description="whose checkpoint; null: the newest")

    @model_serializer
    def _as_given(self) -> dict[str, Any]:
        return {"from": self.origin, "step": self.step}


class TrainSettings(Settings):
    run_name: Annotated[Text, AfterValidator(_run_name)] = Field(
        "chimera", description="the run's name, in its folder and in the trackers"
    )
    shards: Root | Annotated[list[Root], Field(min_length=1)] | Annotated[dict[str, Root], Field(min_length=1)] = Field(
        "./data/shards",
        description="a folder or address of shards; or several: a list, or a mapping of each stream to its own; all of "
        "one tokenizer",
    )
    cache: Place = Field("./cache", min_length=1, description="folder of decompressed shards, and those fetched")
    cache_limit: Bytes | None = Field(None, description="of shards kept in `cache`, of a remote root; null: all")
    predownload: int = Field(8, ge=1, description="steps ahead that shards are fetched for")
    num_workers: int = Field(0, ge=0, le=1024, description="processes a rank that load; 0: the rank's own")
    seed: int = Field(17, ge=0, le=1 << 31, description="of the order of all blocks, and of new weights")
    global_train_batch_size: int = Field(16, ge=1, description="sequences a step")
    mix_by: Literal["blocks", "tokens"] = Field(
        "blocks", description="what `proportions` are shares of; blocks: of positions, padding among them"
    )
    device_train_microbatch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="tokens a device takes at once; auto: found by trying"
    )
    num_canonical_nodes: int = Field(1, ge=1, description="lanes that the order is dealt to")
    phases: list[PhaseSettings] = Field([], min_length=1, description="spans of steps, each with one mixture")
    curriculum: CurriculumSettings = Field(CurriculumSettings(), description="sequence lengths by step")
    train_on: Literal["all", "assistant"] = Field("all", description="the tokens with a loss; assistant: of answers")
    document_ends: Literal["eos", "bos", "none"] | None = Field(
        None,
        description="token shards made by others: what parts their documents, none being one a sequence; null: EOS, if "
        "their first blocks look so",
    )
    document_mask: Switch = Field(True, description="whether a document sees itself alone in a sequence")
    max_duration: str | None = Field(None, description="the step to stop before, `45000ba`; null: the whole plan")
    max_passes: float = Field(4.0, ge=0, description="passes over a stream past which the plan warns")
    tokens_per_second: float | None = Field(None, gt=0, description="the speed that the plan tells times by")
    model: dict[str, Any] = Field({}, description="a configuration of transformers, or `{pretrained: FOLDER}`")
    beyond_positions: Switch = Field(
        False, description="sequences longer than the model's positions; its export names the longer context"
    )
    tokenizer: Place | None = Field(
        None, description="a folder, here or in a store: must be the shards' own; null: theirs"
    )
    optimizer: OptimizerSettings = Field(OptimizerSettings(), description="how weights follow gradients")
    scheduler: SchedulerSettings = Field(SchedulerSettings(), description="the learning rate over steps")
    precision: Literal["auto", "fp32", "amp_bf16", "amp_fp16"] = Field(
        "auto", description="auto: amp_bf16 on a GPU, fp32 on a CPU"
    )
    attn_implementation: str = Field("sdpa", description="sdpa, eager, flex_attention or flash_attention_2")
    parallelism: dict[str, Any] = Field({}, description="Composer's `parallelism_config`, `{fsdp: {...}}`")
    activation_checkpointing: Switch = Field(False, description="less memory for more time")
    compile: Switch = Field(False, description="torch.compile")
    liger: Switch = Field(False, description="Liger's kernels, on a GPU")
    save_folder: Place = Field(
        "./runs/{run_name}",
        min_length=1,
        description="a folder or address; `{run_name}` is filled in",
    )
    save_interval: int = Field(1000, ge=0, description="steps between checkpoints")
    save_keep: Literal[-1] | Annotated[int, Field(ge=1)] = Field(3, description="newest checkpoints kept; -1: all")
    load_path: Place | None = Field(None, description="a checkpoint to start from, by its file")
    branch: BranchSettings | None = Field(None, description="begin as a branch of another run; null: no branch")
    autoresume: Switch = Field(False, description="go on from the newest complete checkpoint of `save_folder`")
    min_start_step: int = Field(0, ge=0, description="refuse to start before it (a later phase in a file of its own)")
    eval: EvalSettings = Field(EvalSettings(), description="loss on the eval splits")
    generate: GenerateSettings = Field(GenerateSettings(), description="texts that the model writes on the way")
    loggers: list[str] = Field([], description="tensorboard, wandb, mlflow; the file is always written")
    progress_bar: Switch = Field(True, description="on a terminal")
    dist_timeout: float = Field(300.0, ge=1, le=10**7, description="seconds a rank waits for the others")

    @field_validator("model")
    @classmethod
    def _model(cls, model: dict[str, Any]) -> dict[str, Any]:
        for key, value in model.items():
            if "drop" in key and isinstance(value, int | float) and not 0 <= value <= 1:  # nan neither
                raise ValueError(f"`model.{key}` is {value}; it must be from 0 to 1")
        return model

    @model_validator(mode="after")
    def _one_start(self) -> "TrainSettings":
        if self.branch and self.load_path:
            raise ValueError("settings `branch` and `load_path` both say what to start from: leave one of them out")
        return self

    @model_validator(mode="after")
    def _save_folder(self) -> "TrainSettings":
        self.save_folder = self.save_folder.replace("{run_name}", self.run_name)
        if "{" in self.save_folder or "}" in self.save_folder:
            raise ValueError(
                f"setting `save_folder` is {self.save_folder!r}; no braces are possible but those of {{run_name}}: "
                "Composer would fill them in for its own files alone"
            )
        return self


def read_settings(path: Path, overrides: list[str]) -> TrainSettings:
    """The settings of a training YAML; raises `UserError` naming the key."""
    return load_settings(TrainSettings, path, overrides)
