"""Which checkpoint a run starts from, and its copy on every node.

A checkpoint counts once it was read to its last byte: one that a kill, a full disk or a broken upload has cut is
passed over. One in an object store is fetched to each node, and removed once it is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.utils import dist

from chimera.cli import UserError, say
from chimera.stores import is_remote
from chimera.train.run.branch import check_same, is_checkpoint, of_step, parent_of
from chimera.train.run.checkpoint_file import damage_of, read_checkpoint
from chimera.train.run.checkpoint_schema import Parent
from chimera.train.run.run_store import NAME, RunStore, fetch
from chimera.train.settings import BranchSettings, TrainSettings

FETCHED = ".fetched-node{}.pt"


@dataclass(frozen=True)
class Start:
    """Where a run starts: at `step`, from the checkpoint `path`, a file or a URI (None: from nothing).

    `own`: it goes on in its folder; False: it begins a branch, from a checkpoint of elsewhere. `parent` is that of a
    branch, also of one that goes on.
    """

    step: int
    path: str | None
    own: bool = True
    parent: Parent | None = None


def find_checkpoints(folder: Path) -> list[tuple[int, str]]:
    """All checkpoints of a local folder as (step, path), newest first; a name says nothing about being whole."""
    paths = folder.iterdir() if folder.is_dir() else []
    return sorted([(int(match[2]), str(path)) for path in paths if (match := NAME.fullmatch(path.name))], reverse=True)


def choose_start(settings: TrainSettings, folder: Path) -> Start:
    """The checkpoint the settings ask for, and the run's own files as they were then; for global rank 0.

    Raises `UserError` where the start would leave other checkpoints of `save_folder` behind, or is not possible.

    Args:
        folder: local folder of the run; what is in an object store is fetched into it.
    """
    start = find_start(settings, folder)
    if is_remote(settings.save_folder):
        RunStore(settings.save_folder).fetch_files(folder, start.step)
    return start


def find_start(settings: TrainSettings, folder: Path) -> Start:
    """As `choose_start`, but of what is in an object store the checkpoint alone is fetched into `folder`."""
    found = checkpoints_at(settings.save_folder)
    start = None
    if settings.autoresume:
        start = newest_complete(found, folder)
        if start and settings.load_path:
            say(f"setting `load_path` is not used: `autoresume` goes on from what is in {settings.save_folder}")
        if start and settings.branch:
            check_same(settings.branch, start.parent, settings.save_folder)
    elif found and not (settings.load_path and _same(settings.load_path, found[0][1])):
        raise UserError(
            f"save_folder {settings.save_folder} holds the checkpoints of an earlier run, up to step {found[0][0]}: "
            "`autoresume=true` goes on from the newest, another `run_name` or `save_folder` starts anew, also from a "
            "`branch` or `load_path`; to go back in this one, move the later checkpoints elsewhere first"
        )
    if start is None and settings.branch:
        start = _branch(settings.branch, folder, settings.save_folder)
    elif start is None and settings.load_path:
        start = _given(settings.load_path, settings.load_path, "load_path", folder, settings.save_folder)
    start = start or Start(0, None)
    if start.step < settings.min_start_step:
        there = f"the newest complete one is at step {start.step}" if start.path else "there is none"
        raise UserError(
            f"this config starts at step {settings.min_start_step} or later, from a checkpoint in "
            f"{settings.save_folder}, but {there}: run the phase before first"
        )
    return start


def checkpoints_at(place: str) -> list[tuple[int, str]]:
    """All checkpoints of a run as (step, path or URI), newest first."""
    return RunStore(place).checkpoints() if is_remote(place) else find_checkpoints(Path(place))


def newest_complete(found: Sequence[tuple[int, str]], folder: Path) -> Start | None:
    """The first of `found` that can be read to its last byte; damaged ones are passed over with a warning."""
    for step, path in found:
        if damage := damage_of(_fetched(path, folder)):
            say(f"warning: checkpoint {path} is damaged ({damage}) and passed over")
        else:
            held, about = _held(on_this_node(path, folder), step)
            parent = about.get("parent")
            return Start(held, path, parent=parent and Parent(**parent))
    return None


def _branch(branch: BranchSettings, folder: Path, save_folder: str) -> Start:
    """The checkpoint that a branch begins with, of a run or given itself."""
    place, path, newest = branch.origin, branch.origin, None
    if not is_checkpoint(place):
        if not (found := checkpoints_at(place)):
            raise UserError(
                f"setting `branch.from`: {place} holds no checkpoint: give the `save_folder` of a run that has saved "
                "one, or a checkpoint's file"
            )
        newest = newest_complete(found, folder) if branch.step is None else None
        path = newest.path if newest and newest.path else of_step(found, branch.step or found[0][0], place)
    start = _given(path, place, "branch.from", folder, save_folder, whole=path == (newest and newest.path))
    if branch.step not in (None, start.step):
        raise UserError(
            f"setting `branch.step` is {branch.step}, but {path} holds step {start.step}: leave `branch.step` out, or "
            "give the checkpoint of that step"
        )
    if start.own:
        raise UserError(
            f"setting `branch.from` is in the run's own save_folder {save_folder}: a branch begins in a `run_name` or "
            "`save_folder` of its own; to go back in this one, move the later checkpoints elsewhere first"
        )
    return start


def _given(path: str, place: str, key: str, folder: Path, save_folder: str, whole: bool = False) -> Start:
    """The checkpoint `path`, by a name that may be anything, which setting `key` gives as `place`.

    `whole`: it is on this node, and read to its end.
    """
    file = on_this_node(path, folder) if whole else _fetched(path, folder)
    if file.suffix == ".safetensors" or (file.is_dir() and any(file.glob("*.safetensors"))):
        raise UserError(f"setting `{key}`: {path} holds weights alone: start from them with `model.pretrained`")
    if file.is_dir():
        raise UserError(
            f"setting `{key}`: {path} is a folder: give the checkpoint in it, say latest-rank0.pt, or the "
            "folder as `branch.from`"
        )
    if not whole and (damage := damage_of(file)):
        raise UserError(f"setting `{key}`: checkpoint {path} cannot be read: {damage}")
    match = NAME.fullmatch(Path(path).name if is_remote(path) else file.resolve().name)
    step, about = _held(file, int(match[2]) if match else None)
    beside = path.rpartition("/")[0] if is_remote(path) else str(file.resolve().parent)
    if _same(beside, save_folder):
        parent = about.get("parent")
        return Start(step, path, parent=parent and Parent(**parent))
    return Start(step, path, own=False, parent=parent_of(place, path, file, step, about))


def _held(file: Path, named: int | None) -> tuple[int, dict[str, Any]]:
    """The step that a whole checkpoint holds, whatever step its name says, if one; and what it says of its run."""
    try:
        state = read_checkpoint(file, lazy=True)
    except UserError:
        if named is None:
            raise
        return named, {}  # what it is of is said where it is loaded
    held = int(state["dataset_state"]["train"]["step"])
    if named not in (None, held):
        say(f"warning: checkpoint {file} holds step {held}, whatever its name says")
    return held, state["callbacks"]["About"]["about"]


def _same(path: str, other: str) -> bool:
    if is_remote(path) or is_remote(other):
        return path.rstrip("/") == other.rstrip("/")
    return Path(path).resolve() == Path(other).resolve()


def on_this_node(path: str, folder: Path) -> Path:
    """Where the checkpoint `path` is, or is fetched to, on this node."""
    return folder / FETCHED.format(dist.get_node_rank()) if is_remote(path) else Path(path)


def _fetched(path: str, folder: Path) -> Path:
    file = on_this_node(path, folder)
    if is_remote(path):
        fetch(path, file)
    return file


def fetch_to_node(path: str, folder: Path) -> None:
    """Have the chosen checkpoint on a node other than global rank 0's; raises `UserError` where it is not whole."""
    if damage := damage_of(_fetched(path, folder)):
        raise UserError(
            f"checkpoint {path} cannot be read on node {dist.get_node_rank()} ({damage}): `save_folder` must be a "
            "folder that all nodes share, or an object store"
        )
    read_checkpoint(on_this_node(path, folder), lazy=True)  # the guard stands before each node's load


def remove_copy(folder: Path) -> None:
    """Remove this node's copy of a checkpoint of an object store."""
    if dist.get_local_rank() == 0:
        (folder / FETCHED.format(dist.get_node_rank())).unlink(missing_ok=True)
