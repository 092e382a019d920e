"""Checkpoints: save them whole, keep the last few.

Composer writes the files and names (`ep…-ba…-rank….pt`, `latest-rank0.pt`). Here is what a preemptible machine
needs on top: a full disk is one clear error, SIGTERM saves within the step, a second run on the same folder is
refused, and random state is restored in mid-epoch.
"""

import ctypes
import os
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State, Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Event
from composer.utils import dist, parse_uri, reproducibility

from chimera.cli import UserError, say
from chimera.files import try_lock
from chimera.stores import is_remote
from chimera.text import size
from chimera.train.run.checkpoint_file import damage_of
from chimera.train.run.run_store import RunStore, prefix_of
from chimera.train.run.start import find_checkpoints

PREEMPTED = 143  # exit code: 128 + SIGTERM


class StopRequested(Exception):
    """The run was asked to stop and has saved; the process exits with `PREEMPTED`."""


class Checkpoints(CheckpointSaver):
    """Composer's saver; also saves when the run is asked to stop, and rotates files of earlier processes too.

    Args:
        folder: where checkpoints go, local or an object store's URI.
        run_folder: local folder of the run's own files, which go along to an object store.
        interval: steps between checkpoints.
        keep: newest checkpoints kept in a local folder; -1: all.
    """

    def __init__(self, folder: str, run_folder: Path, interval: int, keep: int) -> None:
        self.uri, self.run_folder = folder, run_folder
        self.interval = interval
        self.stop_signal: int | None = None
        self.stopping = False
        self.handlers: dict[int, Any] = {}
        prefix = prefix_of(folder) if is_remote(folder) else ""
        super().__init__(
            folder=folder,
            remote_file_name=f"{prefix}ep{{epoch}}-ba{{batch}}-rank{{rank}}.pt",
            latest_remote_file_name=f"{prefix}latest-rank{{rank}}.pt",
            save_interval=self._is_due,
            overwrite=True,  # what is newer than the checkpoint a run resumes from is its own to write again
            num_checkpoints_to_keep=keep,
        )
        # A preempted machine has seconds, and Composer would take 30 between two looks for an upload, after some ten
        # to import itself in a process that looks.
        self._symlink_upload_wait_before_next_try_in_seconds = 1.0
        if self.remote_uploader is not None:
            self.remote_uploader.check_remote_files_exist_executor = ThreadPoolExecutor(2)

    def _is_due(self, state: State, event: Event) -> bool:
        if event != Event.BATCH_CHECKPOINT:
            return False
        step = state.timestamp.batch.value
        last = state.max_duration is not None and state.timestamp >= state.max_duration
        return self.stopping or last or (self.interval > 0 and step % self.interval == 0)

    def fit_start(self, state: State, logger: Logger) -> None:
        super().fit_start(state, logger)
        step = state.timestamp.batch.value
        if dist.get_global_rank() == 0 and self.remote_uploader is None:
            older = [(s, p) for s, p in find_checkpoints(Path(self.folder)) if s <= step]
            self.saved_checkpoints = [path for _, path in reversed(older)]
        elif dist.get_global_rank() == 0:
            self.remote_uploader.upload_executor.submit(parse_uri, self.uri)  # so that its process imports Composer now
        for number in (signal.SIGTERM, signal.SIGINT):
            self.handlers[number] = signal.signal(number, self._ask_to_stop)

    def close(self, state: State, logger: Logger) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}

    def _ask_to_stop(self, number: int, _frame: Any) -> None:
        if self.stop_signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second Ctrl-C does not wait
        self.stop_signal = number

    def batch_end(self, state: State, logger: Logger) -> None:
        """Agree with all ranks whether to stop here: a signal reaches them at different steps."""
        super().batch_end(state, logger)
        asked = torch.tensor([int(self.stop_signal is not None)], dtype=torch.uint8)
        asked = state.device.tensor_to_device(asked)
        dist.all_reduce(asked, reduce_operation="MAX")
        if asked.item():
            self.stopping = True

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        super().batch_checkpoint(state, logger)
        if self.stopping and state.max_duration is not None and state.timestamp < state.max_duration:
            self.fit_end(state, logger)  # waits for uploads
            raise StopRequested(f"stopped at step {state.timestamp.batch.value}, checkpoint saved")

    def _check_weights(self, state: State) -> None:
        """Raise `UserError` on all ranks where a weight is not finite: a start from its checkpoint could but fail.

        `Monitor` sees the losses alone, and the step that spoils the weights has a loss of those before it.
        """
        finite = torch.stack([parameter.isfinite().all() for parameter in state.model.parameters()]).all()
        off = state.device.tensor_to_device((~finite).to(torch.uint8))
        dist.all_reduce(off, reduce_operation="MAX")
        if off.item():
            raise UserError(
                f"weights are not finite after step {state.timestamp.batch.value - 1}, though its loss was: no "
                "checkpoint of them was saved; lower `optimizer.lr` or set `optimizer.clip_norm`, and start again from "
                "the one before"
            )

    def _save_checkpoint(self, state: State, logger: Logger) -> None:
        self._check_weights(state)
        path = Path(self.filename.format(state))
        try:
            super()._save_checkpoint(state, logger)
            if self.remote_uploader is not None and dist.get_global_rank() == 0:
                RunStore(self.uri).push_files(self.run_folder)
        except (OSError, RuntimeError) as error:
            if not path.exists() or damage_of(path) is None:
                raise
            path.unlink(missing_ok=True)  # a torn file of ours; the checkpoint before it stays
            free = os.statvfs(path.parent)
            raise UserError(
                f"checkpoint {path} could not be written ({str(error).splitlines()[0]}; "
                f"{size(free.f_bavail * free.f_frsize)} are free there): make room and start again with "
                f"`autoresume=true`; the run goes on from the checkpoint before"
            ) from None

    def _rotate_checkpoints(self, sharding_enabled: bool = False) -> None:
        self.saved_checkpoints = [path for path in self.saved_checkpoints if os.path.exists(path)]
        super()._rotate_checkpoints(sharding_enabled)


class RestoreRandomState(Callback):
    """Restore random state at the first resumed batch.

    Composer 0.32 restores it only at an epoch's beginning or while it spins a loader forward; a dataset that
    resumes by itself gets neither (`Trainer._train_loop`: `_rng_state` is never read in mid-epoch).
    """

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def batch_start(self, state: State, logger: Logger) -> None:
        if self.trainer is not None and self.trainer._rng_state is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # another rank count than before is what this project is for
                reproducibility.load_rng_state(self.trainer._rng_state)
            self.trainer._rng_state = None


def lock_folder(folder: Path, patience: float = 60) -> Any:
    """Hold `folder` for this run (rank 0 only); the lock is the kernel's and ends with the process.

    Waits up to `patience` seconds for a run that is on its way out (it was sent SIGTERM, say), then raises
    `UserError`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    except OSError as error:
        raise UserError(f"save_folder {folder} cannot be written to: {error.strerror}") from None
    deadline, said = time.monotonic() + patience, False
    while not try_lock(file.fileno(), folder):
        file.seek(0)
        holder = file.read().strip() or "?"
        if time.monotonic() > deadline:
            raise UserError(
                f"save_folder {folder} is in use by another run (process {holder}): stop that run, or set "
                "another `run_name` or `save_folder`"
            )
        if not said:
            say(f"waiting for another run (process {holder}) to leave {folder}")
            said = True
        time.sleep(0.5)
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def stop_with_parent() -> None:
    """Have the kernel send SIGTERM when the launcher dies, so that no rank trains on without it (Linux)."""
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    except (OSError, AttributeError):
        return
