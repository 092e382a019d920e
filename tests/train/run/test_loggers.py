"""Trackers against real servers on loopback: curves arrive, a refusal is one line, a server that goes ends nothing."""

import contextlib
import http.server
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from chimera.cli import UserError
from chimera.commands.train import main
from tests.train.conftest import ROOT, forget_trackers, steps_of

KEY = "0123456789abcdef0123456789abcdef01234567"


class Answer(http.server.BaseHTTPRequestHandler):
    """One answer to everything, with the server's `status`; to GraphQL that of a W&B server that takes any run."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.dumps({"errors": [{"message": "refused"}]} if self.server.status >= 400 else {"data": RUN}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        pass


BUCKET = {"id": "1", "name": "demo", "displayName": "demo", "project": {"name": "p", "entity": {"name": "e"}}}
RUN = {
    "upsertBucket": {"bucket": BUCKET, "inserted": True},
    "viewer": {"id": "1", "username": "e", "entity": "e"},
    "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
}


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    status = 200


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Answer) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield serving
        serving.shutdown()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def address(server: Server, status: int | None) -> str:
    """That of `server`, answering `status`; None: one where nobody listens. With a user and password in it."""
    server.status = status or 200
    return f"http://me:pass-word@127.0.0.1:{server.server_port if status else free_port()}"


def test_curves_go_to_the_loggers_named(overrides, tmp_path):
    main(overrides("run", "max_duration=2ba", "loggers=[file, tensorboard]"))
    assert list((tmp_path / "run" / "tensorboard").rglob("events.out.tfevents.*"))
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["settings"]["seed"] == 17
    assert about["versions"]["mosaicml-streaming"] == "0.13.0"
    assert len(about["manifest"]) == 64
    with pytest.raises(UserError, match="loggers` names 'tensorbord'"):
        main(overrides("other", "loggers=[tensorbord]"))


def test_trackers_hold_the_curves_of_all_starts_of_a_run(overrides, tmp_path, monkeypatch):
    forget_trackers()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)  # MLflow keeps tables in ./mlruns
    main(overrides("run", "max_duration=5ba", "loggers=[wandb, mlflow]"))
    # another setting: trackers refuse to change those of a run they know
    main(overrides("run", "max_duration=8ba", "loggers=[wandb, mlflow]", "optimizer.lr=0.001"))
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        (runs,) = database.execute("select count(*) from runs").fetchone()
        steps = database.execute("select step from metrics where key = 'loss/train/total' order by step").fetchall()
        settings = database.execute("select key from params where key like '%/settings'").fetchall()
    assert runs == 1
    assert [step for (step,) in steps] == list(range(8))
    assert sorted(key for (key,) in settings) == ["start_0/settings", "start_1/settings"]
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))) == 2  # offline, each start is a file


@pytest.mark.parametrize("status", [401, 403, 500, None])
def test_an_mlflow_server_that_refuses_or_is_away_ends_the_run_before_training(
    overrides, tmp_path, monkeypatch, server, status
):
    mlflow.set_tracking_uri(None)  # an earlier run's, which counts more than the environment
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address(server, status))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"logger mlflow cannot be opened .*check MLFLOW_TRACKING_URI") as refusal:
        main(overrides("run", "loggers=[mlflow]"))
    assert "\n" not in str(refusal.value)
    assert "pass-word" not in str(refusal.value)
    assert not (tmp_path / "run" / "steps.jsonl").exists()


def test_a_tensorboard_folder_that_cannot_be_written_ends_the_run_before_training(overrides, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").touch()
    with pytest.raises(UserError, match=r"logger tensorboard cannot be opened \(.*run/tensorboard"):
        main(overrides("run", "loggers=[tensorboard]"))
    assert not (tmp_path / "run" / "steps.jsonl").exists()


def launch(
    commands: Path, folder: Path, ranks: int, config: list[str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """The trainer as its users start it, without a terminal: W&B reads its environment once a process."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "MLFLOW_"))}
    start = [str(commands / "python"), "-m"] if ranks == 1 else [str(commands / "composer"), "-n", str(ranks), "-m"]
    return subprocess.run(
        [*start, "chimera.train", *config],
        cwd=folder,
        env={**settings, "PYTHONPATH": str(ROOT), "HOME": str(folder), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("ranks", "status", "key"), [(1, 200, ""), (1, 401, KEY), (2, None, KEY)], ids=["no key", "wrong key", "no server"]
)
def test_wandb_without_key_or_server_is_one_line_before_training(overrides, tmp_path, server, warm, ranks, status, key):
    where = address(server, status).replace("me:pass-word@", "")
    environment = {"WANDB_BASE_URL": where, "WANDB_INIT_TIMEOUT": "4"} | ({"WANDB_API_KEY": key} if key else {})
    done = launch(warm, tmp_path, ranks, overrides("run", "loggers=[wandb]"), **environment)
    assert done.returncode == 2, done.stdout
    assert done.stdout.count("error: logger wandb cannot be opened (") == 1, done.stdout  # of all ranks
    assert "Traceback" not in done.stdout
    assert "Failed to export" not in done.stdout
    assert KEY not in done.stdout
    assert not (tmp_path / "run" / "steps.jsonl").exists()


def stop_at(step: int, folder: Path, stop) -> threading.Thread:
    """Call `stop` once the run in `folder` has trained `step`."""

    def wait() -> None:
        while not (folder / "steps.jsonl").exists() or f'"step": {step},' not in (folder / "steps.jsonl").read_text():
            time.sleep(0.05)
        stop()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def check_complete(folder: Path, output: str, name: str) -> None:
    assert len(steps_of(folder)) == len((folder / "metrics.jsonl").read_text().splitlines()) == 30
    assert output.count(f"warning: logger {name} failed (") == 1, output
    assert "Traceback" not in output, output


@pytest.mark.chaos  # not for its kill, but because the server takes long: a run outlives wandb's below
def test_a_run_outlives_its_mlflow_server(overrides, tmp_path, warm):
    port = free_port()
    words = ["--backend-store-uri", f"sqlite:///{tmp_path}/server.db", "--artifacts-destination", f"{tmp_path}/files"]
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *words],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server)
            stop_at(2, tmp_path / "run", lambda: os.killpg(server.pid, signal.SIGKILL))
            environment = {"MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
            done = launch(warm, tmp_path, 1, overrides("run", "loggers=[mlflow]"), **environment)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
    assert done.returncode == 0, done.stdout
    check_complete(tmp_path / "run", done.stdout, "mlflow")


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    while True:
        assert server.poll() is None
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)


def test_a_run_outlives_its_wandb_server(overrides, tmp_path, server, warm):
    """W&B's own process tries on without a word; at the end of the run it is waited for no longer than set."""

    def stop() -> None:
        server.shutdown()
        server.server_close()

    stop_at(2, tmp_path / "run", stop)
    environment = {"WANDB_BASE_URL": address(server, 200).replace("me:pass-word@", ""), "WANDB_API_KEY": KEY}
    done = launch(warm, tmp_path, 1, overrides("run", "loggers=[wandb]"), **environment, WANDB_FINISH_TIMEOUT="5")
    assert done.returncode == 0, done.stdout
    assert KEY not in done.stdout
    check_complete(tmp_path / "run", done.stdout, "wandb")
