"""A branch: a run that begins with a checkpoint of another one. Which checkpoint that is, and what is recorded of it.

The checkpoints of a branch name its parent, so that it goes on as that branch also when the parent is gone.
"""

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from chimera.cli import UserError
from chimera.stores import is_remote
from chimera.train.run.checkpoint_schema import Parent
from chimera.train.settings import BranchSettings

SHOWN = 24  # steps of a list


def is_checkpoint(place: str) -> bool:
    """Whether `place` names one checkpoint, and not a run's `save_folder`: a file, or in a store what ends so."""
    return place.endswith(".pt") if is_remote(place) else not Path(place).is_dir()


def of_step(found: Sequence[tuple[int, str]], step: int, place: str) -> str:
    """The checkpoint of `step` among those `found` at `place`; raises `UserError` that lists the steps there are."""
    for there, path in found:
        if there == step:
            return path
    raise UserError(
        f"setting `branch.step` is {step}, but {place} holds no checkpoint of it, only of {steps_of(found)}: give one "
        "of these, or leave it out for the newest"
    )


def steps_of(found: Sequence[tuple[int, str]]) -> str:
    """The steps of checkpoints in order, the middle of a long list left out."""
    steps = [f"step {step}" if number == 0 else str(step) for number, step in enumerate(sorted({s for s, _ in found}))]
    if len(steps) > SHOWN:
        steps[SHOWN // 2 : -SHOWN // 2] = [f"… ({len(steps) - SHOWN} more)"]
    return ", ".join(steps)


def parent_of(place: str, path: str, file: Path, step: int, about: Mapping[str, Any]) -> Parent:
    """What a branch records of the checkpoint it begins with.

    Args:
        place: what the config names: `branch.from`, or `load_path`.
        path: the checkpoint, its file or URI.
        file: the same on this node; read to its end.
        step: that it holds.
        about: what it says of its run (`callbacks.About`).
    """
    digest = sha256()
    with file.open("rb") as data:
        while piece := data.read(1 << 20):
            digest.update(piece)
    at = path if is_remote(path) else str(Path(path).resolve())
    name = str(about.get("run_name", ""))
    return Parent(address=absolute(place), checkpoint=at, step=step, digest=digest.hexdigest(), run_name=name)


def check_same(branch: BranchSettings, parent: Parent | None, save_folder: str) -> None:
    """Raise `UserError` unless what goes on in `save_folder` began as the `branch` that the config asks for."""
    if parent is None:
        was = "is no branch of another"
    elif parent.address != absolute(branch.origin) or branch.step not in (None, parent.step):
        was = f"began at step {parent.step} of {parent.address}"
    else:
        return
    asked = branch.origin if branch.step is None else f"step {branch.step} of {branch.origin}"
    raise UserError(
        f"setting `branch` asks for {asked}, but the run in {save_folder} {was}: a branch begins in a `save_folder` of "
        "its own; or set `branch` back, to go on with that run"
    )


def absolute(place: str) -> str:
    """An address, or a local path whatever folder it was given from."""
    return place.rstrip("/") if is_remote(place) else os.path.abspath(place)
