"""The report of two runs, of runs in a store and of runs under way, on save folders as training leaves them."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from chimera.cli import UserError
from chimera.commands import report
from chimera.train.history.compare import Pair
from chimera.train.history.run_files import read_run
from chimera.train.run.checkpoints import lock_folder
from chimera.train.run.run_store import RunStore
from tests.convert.s3_server import S3Server
from tests.train.history.test_report import ROOT, record, write_lines

PARENT = {"step": 20, "digest": "0" * 64, "run_name": "<b>run"}


@pytest.fixture
def one(demo_shards: Path, tmp_path: Path) -> Path:
    return record(demo_shards, tmp_path / "one", steps=40)


@pytest.fixture
def branch(demo_shards: Path, tmp_path: Path, one: Path) -> Path:
    """A branch of `one` from step 20 on, with other batches from step 30 on."""
    folder = record(demo_shards, tmp_path / "branch", steps=40)
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()][20:]
    for line in lines[10:]:
        line["digest"] = line["digest"][::-1]
    write_lines(folder / "steps.jsonl", lines)
    about = json.loads((folder / "config.json").read_text())
    about["settings"]["run_name"] = "branch"
    about["settings"]["optimizer"]["lr"] = 0.5
    about["parent"] = {**PARENT, "address": str(one), "checkpoint": f"{one}/ep0-ba20-rank0.pt"}
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def test_two_runs_are_compared_step_by_step(
    one: Path, branch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "two.html"
    assert report.main([str(one), str(branch), "--out", str(page)]) == 1, "the branch is not its plan's from 30 on"
    said = capsys.readouterr().out
    assert f"runs <b>run ({one}) and branch ({branch})\nbranch is a branch of <b>run at step 20\n" in said
    words = "the same batches up to step 29; 10 of the 20 steps that both logged differ, the first is step 30"
    assert f"digests: {words}\n" in said
    rows = [line.split() for line in said.splitlines()]
    assert ["optimizer.lr", "0.003", "0.5"] in rows
    assert [row[0] for row in rows[rows.index(["different", "<b>run", "branch"]) + 1 :] if len(row) == 3] == [
        "optimizer.lr"
    ]
    assert ["knowledge", "32", "0–11", "5.672", "3.997", "–", "–"] in rows
    assert "<b>run: digests: all 40 steps equal those computed from the plan and the shards" in said
    assert "branch: digests: 10 steps DIFFER from the plan's, the first is step 30" in said
    html = page.read_text()
    assert words in html
    assert "Mix of &lt;b&gt;run" in html
    assert "<b>run" not in html
    assert html.count("<svg") == 5, "loss, two mixes, one stream evaluated by both, throughput"
    assert "<title>the first step with other batches</title>" in html
    assert "<title>branch began</title>" in html
    assert not list(tmp_path.glob("*/report.html"))


def test_runs_without_a_difference_and_runs_without_a_step_in_common(
    one: Path, branch: Path, demo_shards: Path, tmp_path: Path
) -> None:
    twin = record(demo_shards, tmp_path / "twin", steps=15)
    pair = Pair(read_run(one), read_run(twin))
    assert pair.names == (str(one), str(twin)), "both have one name"
    assert pair.agreement == "all 15 steps that both logged (0–14) have the same batches"
    assert pair.differences == []
    pair = Pair(read_run(twin), read_run(branch))
    assert pair.agreement == "no step is logged by both"
    assert report.main([str(one), str(twin), "--out", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize("kept", [20, 40])
def test_a_parent_and_a_branch_that_has_other_batches_at_once(one: Path, branch: Path, kept: int) -> None:
    lines = [json.loads(line) for line in (branch / "steps.jsonl").read_text().splitlines()]
    write_lines(branch / "steps.jsonl", [{**line, "digest": "0" * 32} for line in lines])
    steps = (one / "steps.jsonl").read_text().splitlines(keepends=True)
    (one / "steps.jsonl").write_text("".join(steps[:kept]))
    both = "; 20 of the 20 steps that both logged differ, the first is step 20"
    expected = {20: "no step is logged by both", 40: "the same batches up to step 19"}[kept]
    assert Pair(read_run(one), read_run(branch)).agreement == (
        f"{expected}, where one left the other{both if kept == 40 else ''}"
    )


def test_a_branch_says_where_it_left_its_parent(branch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report.main([str(branch)])
    assert "branch of <b>run at step 20: " in capsys.readouterr().out
    html = (branch / "report.html").read_text()
    assert "a branch of &lt;b&gt;run at step 20" in html
    assert "<title>branch of &lt;b&gt;run at step 20</title>" in html
    assert PARENT["digest"] in html


def test_as_json_a_report_is_one_object_and_no_page(
    one: Path, branch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(one), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["run_name"], about["done"], about["steps"], about["tokens"]) == ("<b>run", 40, 40, 51_200)
    assert about["digests"]["compared"] == 40
    assert about["digests"]["differing"] == []
    assert about["stages"][3]["mean_loss"] == pytest.approx(read_run(one).stages()[3].mean_loss)
    assert about["checkpoints"] == [{"step": 40, "file": "ep0-ba40-rank0.pt", "bytes": 1000}]
    assert about["evals"] == [{"stream": "it_culturax", "seq_len": 128, "step": 9, "loss": 5.5}]
    assert report.main([str(one), str(branch), "--json"]) == 1
    about = json.loads(capsys.readouterr().out)
    assert [run["run_name"] for run in about["runs"]] == ["<b>run", "branch"]
    assert about["runs"][1]["parent"]["step"] == 20
    assert (about["logged_by_both"], about["same_batches"], about["first_that_differs"]) == (20, 10, 30)
    assert {"key": "optimizer.lr", "values": [0.003, 0.5]} in about["differences"]
    assert not list(one.parent.glob("*/report.html"))


def test_a_watch_without_time_between_its_looks_is_refused(one: Path) -> None:
    with pytest.raises(UserError, match="--every 0: give the seconds"):
        report.main([str(one), "--watch", "--every", "0"])


@pytest.mark.parametrize("key", ["address", "step"])
def test_a_parent_that_training_did_not_write_is_a_user_error(branch: Path, key: str) -> None:
    about = json.loads((branch / "config.json").read_text())
    about["parent"][key] = None
    (branch / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"`parent.{key}` is None"):
        report.main([str(branch)])


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with S3Server(tmp_path / "s3", seaweed=True) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.mark.usefixtures("s3")
def test_a_run_in_a_store_is_read_there(
    one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    address = "s3://bucket/runs/one"
    store = RunStore(address)
    store.push_files(one)
    store._objects.put("ep0-ba40-rank0.pt", one / "ep0-ba40-rank0.pt")
    assert report.main([address]) == 0
    assert "digests: all 40 steps equal those computed" in capsys.readouterr().out
    assert "ep0-ba40-rank0.pt" in (tmp_path / "report.html").read_text()
    assert report.main([address, str(one), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["same_batches"] == 40
    there, here = about["runs"]
    assert (there.pop("save_folder"), here.pop("save_folder")) == (address, str(one))
    assert there == here
    with pytest.raises(UserError, match=r"no run in s3://bucket/runs/two \(no config\.json there\)"):
        report.main(["s3://bucket/runs/two"])


def test_a_run_that_has_ended_is_watched_once(one: Path, demo_shards: Path, tmp_path: Path) -> None:
    stopped = record(demo_shards, tmp_path / "stopped", steps=20)
    for folder in (one, stopped):
        assert report.main([str(folder), "--watch", "--every", "3600"]) == 0
        assert "refresh" not in (folder / "report.html").read_text()
    with lock_folder(one):  # all its steps are done
        assert report.main([str(one), "--watch", "--every", "3600"]) == 0


def watch(folder: Path, *words: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-u", str(ROOT / "train/report.py"), str(folder), "--watch", "--every", "1", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder)


def test_a_run_under_way_is_drawn_until_it_ends(demo_shards: Path, tmp_path: Path) -> None:
    folder = record(demo_shards, tmp_path / "run", steps=40)
    lines = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    (folder / "steps.jsonl").write_text("".join(lines[:20]))
    with lock_folder(folder), watch(folder, "--json", "--out", "page.html") as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["done"] == 20
        assert '<meta http-equiv="refresh" content="1">' in (folder / "page.html").read_text()
        with (folder / "steps.jsonl").open("a") as file:
            file.writelines(lines[20:])
        out, err = process.communicate(timeout=120)
        assert json.loads(out.splitlines()[-1])["done"] == 40
        assert process.returncode == 0
    assert "refresh" not in (folder / "page.html").read_text()
    assert err == "again every 1 s until all steps are done; Ctrl-C ends the looking, not the run\n"


def test_ctrl_c_ends_a_watch_without_a_traceback(demo_shards: Path, tmp_path: Path) -> None:
    folder = record(demo_shards, tmp_path / "run", steps=20)
    with lock_folder(folder), watch(folder) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "run <b>run: 20 of 40 steps, 14,336 tokens\n"
        while "page: " not in process.stdout.readline():
            pass
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == "stopped"
