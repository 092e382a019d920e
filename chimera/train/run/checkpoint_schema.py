"""What one of our checkpoints says beside its tensors: the types of all that is read of it.

Values of other types are refused where the file is read, so that no reader meets them. What earlier versions did not
write has a default; keys that are not named here pass.
"""

import json
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from chimera.manifest import ChatTemplate
from chimera.mds import Json
from chimera.text import one_line
from chimera.train.settings import SchedulerSettings

Count = Annotated[int, Field(ge=0, lt=1 << 48)]  # steps, tokens, blocks: no run has more


def _object(text: str) -> str:
    if not isinstance(json.loads(text), dict):
        raise ValueError("is no JSON object")
    return text


class Part(BaseModel):
    model_config = ConfigDict(strict=True, arbitrary_types_allowed=True)


class Span(Part):
    """Steps that one phase and stage decided."""

    first_step: Count
    end_step: Count
    phase_start: Count
    proportions: dict[str, str]
    seq_len: Count
    sequences_per_step: Count


class DataSettings(Part):
    order: Any
    seed: Any
    block_len: Count
    lanes: Count
    history: list[Span]


class DataState(Part):
    version: int
    step: Count
    block_cursor: Count
    consumed: dict[str, Count]
    fingerprints: dict[str, str]
    settings: DataSettings

    @model_validator(mode="after")
    def _of_itself(self) -> "DataState":
        if unnamed := [name for name, blocks in self.consumed.items() if blocks and name not in self.fingerprints]:
            raise ValueError(f"stream {unnamed[0]!r} has no fingerprint")
        return self


class Base(Part):
    name: str
    files: dict[str, bytes]


class Line(Part):
    """Of a proof file: a text with its ids, or a conversation."""

    ids: list[Count]
    text: str
    messages: list[Json] | None = None
    tools: Any = None
    mask: list[int] = []
    first: int | None = None
    served: bool = False


class Seen(Part):
    from_step: Count
    tokens: dict[str, Count]


class File(Part):
    path: str


class Texts(Part):
    files: Count
    bytes: Count


class Described(Part):
    files: list[File] = []
    texts: Texts | None = None
    hub: str | None = None
    subset: str | None = None
    data_dir: str | None = None
    split: str | None = None
    revision: str | None = None


class Source(Part):
    describe: str | Described = ""


class Schedule(Part):
    peak: float
    steps: Count

    @model_validator(mode="before")
    @classmethod
    def _scheduled(cls, given: Any) -> Any:
        if isinstance(given, dict):
            SchedulerSettings(**{key: value for key, value in given.items() if key not in ("peak", "steps")})
        return given


class Optimizer(Part):
    name: str = ""
    weight_decay_on: str | None = None


class Parent(Part):
    """The checkpoint that a branch began with."""

    address: str  # as the config named it: a run's folder, or the checkpoint
    checkpoint: str  # its file or URI
    step: Count
    digest: str  # SHA-256 of the file
    run_name: str


class About(Part):
    """What `callbacks.About` keeps of the run."""

    model_config = ConfigDict(protected_namespaces=())
    model_config_: Annotated[str, AfterValidator(_object), Field(alias="model_config")]
    tokenizer: Annotated[str, AfterValidator(_object)]
    eos_token: str
    pad_token: str | None
    block_len: Count
    run_name: str
    sources: dict[str, Source | None]
    bos: list[Count] = []
    rotary: list[list[float]] = []
    templates: dict[str, ChatTemplate | str | None] = {}
    train_on: str = ""
    document_mask: bool = True
    document_ends: str = ""
    precision: str = ""
    schedule: Schedule | None = None
    base: Base | None = None
    proofs: dict[str, list[Line]] = {}
    samples: list[list[Count]] = []
    optimizer: Optimizer = Optimizer()
    parent: Parent | None = None


class Checkpoint(Part):
    """What is read of the `state` of a checkpoint."""

    model: dict[str, torch.Tensor]
    about: About
    data: DataState
    seen: Seen | None = None


def what_differs(state: Any) -> str | None:
    """What of the `state` of a checkpoint is not as `train/main.py` writes it, in words; None where all is."""
    try:
        callbacks, data = dict(state["callbacks"]), state["dataset_state"]["train"]
        parts = {"about": callbacks["About"]["about"], "data": data, "model": dict(state["model"])}
        Checkpoint.model_validate({**parts, "seen": callbacks.get("Monitor", {}).get("seen")})
    except ValidationError as error:
        first = error.errors()[0]
        return one_line(f"{'.'.join(map(str, first['loc']))}: {first['msg'].removeprefix('Value error, ')}")[:300]
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        return one_line(f"{type(error).__name__}: {error}")[:300]
    return None
