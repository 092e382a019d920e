"""Where a run's metrics go: `metrics.jsonl`, and what `loggers` names (TensorBoard, W&B, MLflow).

A tracker must open before the first step: a missing key or server ends the run there, in one line. From then on it is
a spectator: whatever becomes of its server, the run goes on and `metrics.jsonl` is complete.
"""

import atexit
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from composer import Event, Logger, State
from composer.loggers import LoggerDestination, MLFlowLogger, TensorboardLogger, WandBLogger
from composer.utils import dist

from chimera.cli import UserError, say
from chimera.text import one_line
from chimera.train.run.checkpoint_schema import Parent
from chimera.train.run.step_files import MetricsFile
from chimera.train.settings import TrainSettings
from chimera.versions import install

# What mends each, for the message.
REMEDIES = {
    "tensorboard": "it writes to `tensorboard` in `save_folder`",
    "wandb": "check WANDB_BASE_URL and WANDB_API_KEY (or `wandb login`), set WANDB_MODE=offline",
    "mlflow": "check MLFLOW_TRACKING_URI, and MLFLOW_TRACKING_USERNAME and _PASSWORD or MLFLOW_TRACKING_TOKEN",
}

# What the clients do unless the environment says otherwise. Their own patience is minutes at the start (W&B 90 s a
# request, MLflow 7 retries) and without end after the last step.
PATIENCE = {
    "WANDB_INIT_TIMEOUT": "30",
    "WANDB_FINISH_TIMEOUT": "120",
    "WANDB_FINISH_TIMEOUT_RAISES": "true",
    "WANDB_SILENT": "true",  # its errors come as ours
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # 2 + 4 + 8 seconds
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print the address with its password
}
SECRETS = ("WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")

# Where MLflow's threads say that the server did not take something; nothing else learns of it.
MLFLOW_THREADS = ("mlflow.utils.async_logging.async_logging_queue", "mlflow.system_metrics.system_metrics_monitor")


def loggers(settings: TrainSettings, folder: Path, parent: Parent | None = None) -> list[LoggerDestination]:
    """`metrics.jsonl` always, and the trackers named in `loggers`; `parent` is that of a branch."""
    return [MetricsFile(folder), Trackers(settings, folder, parent)]


class Trackers(LoggerDestination):
    """The trackers of a run, on rank 0; on the others it only waits until they are open.

    One that does not open is a `UserError` on all ranks; one that fails later is one warning.

    Args:
        settings: of the run; rank 0's `loggers` count.
        folder: the run's local one.
        parent: of a branch, which each tracker is told of.
    """

    def __init__(self, settings: TrainSettings, folder: Path, parent: Parent | None = None) -> None:
        self.settings, self.folder, self.parent = settings, folder, parent
        self.opened: dict[str, LoggerDestination] = {}
        self.warned: set[str] = set()
        starts = folder / "starts.jsonl"
        self.start = len(starts.read_text().splitlines()) if starts.exists() else 0

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        if event == Event.INIT:
            self._open_all(state, logger)
        else:
            self._each("run_event", event, state, logger)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._each("log_metrics", metrics, step)

    def log_hyperparameters(self, hyperparameters: dict[str, Any]) -> None:
        """Keep what each start was made of as `start_0/…`, `start_1/…`.

        A run resumed with another setting or rank count changes it, which trackers refuse; MLflow 3 then drops the
        metrics sent with it.
        """
        self._each("log_hyperparameters", {f"start_{self.start}/{key}": v for key, v in hyperparameters.items()})

    def log_table(
        self, columns: list[str], rows: list[list[Any]], name: str = "Table", step: int | None = None
    ) -> None:
        self._each("log_table", columns, rows, name, step)

    def close(self, state: State, logger: Logger) -> None:
        self._each("close", state, logger)

    def post_close(self) -> None:
        if "mlflow" in self.warned:  # what is left to send gets one try each
            os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        self._each("post_close")

    def _open_all(self, state: State, logger: Logger) -> None:
        refusal: list[str | None] = [None]
        if dist.get_global_rank() == 0:
            try:
                for name in self.settings.loggers:
                    if name != "file":
                        self._open(name, state, logger)
            except UserError as error:
                refusal = [str(error)]
        dist.broadcast_object_list(refusal)
        if refusal[0] is not None:
            raise UserError(refusal[0])

    def _open(self, name: str, state: State, logger: Logger) -> None:
        if name not in REMEDIES:
            raise UserError(f"setting `loggers` names {name!r}; known are file, {', '.join(REMEDIES)}")
        if find_spec(name) is None:
            raise UserError(f"logger {name} is not installed: {install('tracking')}")
        for variable, value in PATIENCE.items():
            os.environ.setdefault(variable, value)
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # W&B's of itself, to a server that is away
        run, parent = self.settings.run_name, self.parent
        origin = f"branch of {parent.run_name} at step {parent.step}: {parent.checkpoint}" if parent else ""
        try:
            tracker: LoggerDestination
            if name == "tensorboard":
                tracker = TensorboardLogger(log_dir=str(self.folder / "tensorboard"))
            elif name == "wandb":
                # one name, one run: a resumed run goes on in the same curves
                group = {"group": parent.run_name} if parent and "WANDB_RUN_GROUP" not in os.environ else {}
                about = {"notes": origin, **group} if parent else {}
                tracker = OneRankWandB(name=run, init_kwargs={"id": run, "resume": "allow", **about})
            else:
                for thread in MLFLOW_THREADS:
                    logging.getLogger(thread).filters[:] = [self._heard]
                tags = {"branch": origin} if parent else None
                tracker = OneRankMLflow(experiment_name=run, run_name=run, resume=True, tags=tags)
            tracker.init(state, logger)
            if parent and isinstance(tracker, TensorboardLogger) and tracker.writer is not None:
                tracker.writer.add_text("branch", origin, parent.step)
        except Exception as error:  # each client has its own kinds
            raise UserError(
                f"logger {name} cannot be opened ({words(error)}): {REMEDIES[name]}, or take it out of `loggers`"
            ) from None
        self.opened[name] = tracker

    def _each(self, method: str, *args: Any) -> None:
        for name, tracker in self.opened.items():
            try:
                getattr(tracker, method)(*args)
            except Exception as error:  # it is asked again: its server may come back
                self._warn(name, words(error))

    def _heard(self, record: logging.LogRecord) -> bool:
        """A filter: a thread's complaint becomes the warning."""
        if record.levelno >= logging.WARNING:
            self._warn("mlflow", words(record.getMessage()))
        return record.levelno < logging.WARNING

    def _warn(self, name: str, reason: str) -> None:
        if name not in self.warned:
            self.warned.add(name)
            say(f"warning: logger {name} failed ({reason}): its curves have gaps, metrics.jsonl has none")


class OneRankWandB(WandBLogger):
    """Composer's, opened on rank 0 alone.

    Composer 0.32 asks `Run.get_url`, which wandb 0.30 dropped for `Run.url` (both have that one), and tells the other
    ranks what only checkpoints kept at W&B need.
    """

    def init(self, state: State, logger: Logger) -> None:
        import wandb

        run = wandb.init(**self._init_kwargs)
        self.entity, self.project, self.run_dir, self.run_url = run.entity, run.project, run.dir, run.url
        atexit.register(self._set_is_in_atexit)
        say(f"wandb: {words(run.url or f'offline, in {run.dir}')}")


class OneRankMLflow(MLFlowLogger):
    """Composer's, opened on rank 0 alone: as its own `init`, without telling the other ranks the run's id."""

    def init(self, state: State, logger: Logger) -> None:
        self.tags["run_name"] = os.environ.get("RUN_NAME", state.run_name)
        self._global_exception_occurred = 0
        hook = sys.excepthook
        sys.excepthook = lambda *error: self._global_exception_handler(hook, *error)
        self._start_mlflow_run(state)
        say(f"mlflow: run {self._run_id} of experiment {self._experiment_id} at {words(self.tracking_uri)}")


def words(reason: object) -> str:
    """`reason` as one line without the secrets that clients quote: an address' user and password, keys."""
    text = one_line(reason)
    for secret in filter(None, map(os.environ.get, SECRETS)):
        text = text.replace(secret, "…")
    return text[:300] or type(reason).__name__
