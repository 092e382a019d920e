"""Which checkpoint a run starts from, and its copy on every node.

A checkpoint counts once it was read to its last byte: one that a kill, a full disk or a broken upload has cut is
passed over. One in an object store is fetched to each node, and removed once it is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from composer.utils import dist

from chimera.cli import UserError, say
from chimera.stores import is_remote
from chimera.train.run.checkpoint_file import damage_of, read_checkpoint
from chimera.train.run.run_store import NAME, RunStore, fetch
from chimera.train.settings import TrainSettings

FETCHED = ".fetched-node{}.pt"


@dataclass(frozen=True)
class Start:
    """Where a run starts: at `step`, from the checkpoint `path`, a file or a URI (None: from nothing).

    `own`: it goes on in its folder; False: it begins a branch, from a checkpoint of elsewhere.
    """

    step: int
    path: str | None
    own: bool = True


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
    store = RunStore(settings.save_folder) if is_remote(settings.save_folder) else None
    found = store.checkpoints() if store else find_checkpoints(folder)
    start = None
    if settings.autoresume:
        start = newest_complete(found, folder)
        if start and settings.load_path:
            say(f"setting `load_path` is not used: `autoresume` goes on from what is in {settings.save_folder}")
    elif found and not (settings.load_path and _same(settings.load_path, found[0][1])):
        raise UserError(
            f"save_folder {settings.save_folder} holds the checkpoints of an earlier run, up to step {found[0][0]}: "
            "`autoresume=true` goes on from the newest, another `run_name` or `save_folder` starts anew, also from a "
            "`load_path`; to go back in this one, move the later checkpoints elsewhere first"
        )
    if start is None and settings.load_path:
        start = _given(settings.load_path, folder, settings.save_folder)
    start = start or Start(0, None)
    if start.step < settings.min_start_step:
        there = f"the newest complete one is at step {start.step}" if start.path else "there is none"
        raise UserError(
            f"this config starts at step {settings.min_start_step} or later, from a checkpoint in "
            f"{settings.save_folder}, but {there}: run the phase before first"
        )
    if store:
        store.fetch_files(folder, start.step)
    return start


def newest_complete(found: Sequence[tuple[int, str]], folder: Path) -> Start | None:
    """The first of `found` that can be read to its last byte; damaged ones are passed over with a warning."""
    for step, path in found:
        if damage := damage_of(_fetched(path, folder)):
            say(f"warning: checkpoint {path} is damaged ({damage}) and passed over")
        else:
            return Start(_step_in(on_this_node(path, folder), step), path)
    return None


def _given(path: str, folder: Path, save_folder: str) -> Start:
    """The checkpoint `load_path`, by a name that may be anything."""
    file = _fetched(path, folder)
    if file.suffix == ".safetensors" or (file.is_dir() and any(file.glob("*.safetensors"))):
        raise UserError(f"setting `load_path`: {path} holds weights alone: start from them with `model.pretrained`")
    if file.is_dir():
        raise UserError(f"setting `load_path`: {path} is a folder: give the checkpoint in it, say latest-rank0.pt")
    if damage := damage_of(file):
        raise UserError(f"setting `load_path`: checkpoint {path} cannot be read: {damage}")
    match = NAME.fullmatch(Path(path).name if is_remote(path) else file.resolve().name)
    step = _step_in(file, int(match[2]) if match else None)
    beside = path.rpartition("/")[0] if is_remote(path) else str(file.resolve().parent)
    return Start(step, path, own=_same(beside, save_folder))


def _step_in(file: Path, named: int | None) -> int:
    """The step that a whole checkpoint holds, whatever step its name says, if one."""
    try:
        held = int(read_checkpoint(file, lazy=True)["dataset_state"]["train"]["step"])
    except UserError:
        if named is None:
            raise
        return named  # what it is of is said where it is loaded
    if named not in (None, held):
        say(f"warning: checkpoint {file} holds step {held}, whatever its name says")
    return held


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
