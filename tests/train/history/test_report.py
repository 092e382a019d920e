"""The report on save folders as training leaves them: whole, in the middle, resumed, damaged."""

import hashlib
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from chimera.cli import UserError
from chimera.commands import report
from chimera.text import neutral
from chimera.train.data.shards import open_shards
from chimera.train.history.charts import TOP, Line, chart
from chimera.train.history.digests import compare_digests
from chimera.train.history.run_files import read_run
from chimera.train.order.ordering import RunOrder, digest, step_blocks
from chimera.train.order.run_plan import plan_of
from chimera.train.settings import read_settings
from tests.train.conftest import rewrite

ROOT = Path(__file__).resolve().parents[3]
ATTRIBUTES = {
    "aria-label",
    "clip-path",
    "d",
    "height",
    "href",
    "id",
    "role",
    "style",
    "transform",
    "viewBox",
    "width",
    "x",
    "y",
}
OVERRIDES = ["phases.0.steps=30", "phases.1.steps=10", "curriculum.stages.1.from_step=12"]
OVERRIDES += ["curriculum.stages.2.from_step=24", "scheduler={}", "run_name=<b>run"]


@pytest.fixture
def folder(demo_shards: Path, tmp_path: Path) -> Path:
    """A save folder as `train/main.py` would leave it after all 40 steps, resumed once on two ranks."""
    return record(demo_shards, tmp_path / "run", steps=40)


def record(shards: Path, folder: Path, steps: int) -> Path:
    overrides = [*OVERRIDES, f"shards={shards}", f"save_folder={folder}"]
    settings = read_settings(ROOT / "yamls/demo/base.yaml", overrides)
    opened = open_shards(settings.shards, settings.cache)
    plan = plan_of(settings, opened.block_len)
    about = {"settings": settings.model_dump(), "versions": {"torch": "2.7.0"}, "manifest": opened.digest}
    about |= {"block_len": opened.block_len, "blocks": {n: s.train.blocks for n, s in opened.streams.items()}}
    about["indexes"] = {n: s.train.index for n, s in opened.streams.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    starts = [{"from_step": step, "ranks": ranks, "versions": about["versions"]} for step, ranks in ((0, 1), (25, 2))]
    write_lines(folder / "starts.jsonl", starts)
    indexes = {n: json.loads((shards / n / "train/index.json").read_text()) for n in plan.streams}
    order = RunOrder(plan, {n: [s["samples"] for s in i["shards"]] for n, i in indexes.items()}, settings.seed)
    lines = []
    for step in range(steps):
        blocks = [(ref.stream, ref.block) for ref in step_blocks(order, step)]
        names = [name for name, _ in blocks]
        segment = plan.segment(step)
        lines.append(
            {
                "step": step,
                "phase": segment.phase_name,
                "seq_len": segment.seq_len,
                "digest": digest(blocks),
                "loss": 2 + 6 * math.exp(-step / 10),
                "tokens": len(blocks) * plan.block_len,
                "streams": {name: names.count(name) * plan.block_len for name in set(names)},
            }
        )
    write_lines(folder / "steps.jsonl", lines)
    metrics = [{"step": step, "throughput/tokens_per_sec": 9000.0 + step} for step in range(steps)]
    metrics[9]["metrics/eval/it_culturax/128/loss"] = 5.5
    write_lines(folder / "metrics.jsonl", metrics)
    (folder / "ep0-ba40-rank0.pt").write_bytes(b"x" * 1000)
    return folder


def write_lines(path: Path, values: list[dict]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def test_summary_states_planned_and_realised_mix_stage_losses_and_equal_digests(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run <b>run: 40 of 40 steps, 51,200 tokens"  # 16 · (12·32 + 12·64 + 16·128)
    assert lines[1] == "starts (step, ranks): step 0 on 1, step 25 on 2"
    rows = [line.split() for line in lines]
    assert ["knowledge", "0–29", "en_cosmopedia", "55.00", "%"] in [row[:5] for row in rows]
    assert [row[:4] for row in rows if row[:1] == ["alignment"] and row[1] == "128"] == [
        ["alignment", "128", "30–39", "10"]
    ]
    assert "digests: all 40 steps equal those computed from the plan and the shards" in lines


def test_realised_mix_is_counted_from_the_steps_and_within_a_block_of_its_target(folder: Path) -> None:
    run = read_run(folder)
    logged = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    for row in run.mix():
        here = [line for line in logged if line["phase"] == row.phase]
        tokens = sum(line["streams"].get(row.stream, 0) for line in here)
        assert row.realised == pytest.approx(tokens / sum(line["tokens"] for line in here))
        assert row.worst is not None
        assert row.worst < 1


def test_stage_losses_are_means_over_their_own_steps(folder: Path) -> None:
    run = read_run(folder)
    assert [(s.phase, s.seq_len, s.first_step, s.end_step, s.done) for s in run.stages()] == [
        ("knowledge", 32, 0, 12, 12),
        ("knowledge", 64, 12, 24, 12),
        ("knowledge", 128, 24, 30, 6),
        ("alignment", 128, 30, 40, 10),
    ]
    assert run.stages()[1].mean_loss == pytest.approx(sum(2 + 6 * math.exp(-s / 10) for s in range(12, 24)) / 12)


def test_a_changed_digest_is_named_and_exits_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    lines[17]["digest"] = "0" * 32
    write_lines(folder / "steps.jsonl", lines)
    assert report.main([str(folder)]) == 1
    assert "1 steps DIFFER from the plan's, the first is step 17" in capsys.readouterr().out


def test_a_run_in_its_middle_with_a_torn_last_line_reports_the_whole_steps(demo_shards: Path, tmp_path: Path) -> None:
    folder = record(demo_shards, tmp_path / "run", steps=20)
    with (folder / "steps.jsonl").open("a") as file:
        file.write('{"step": 20, "pha')
    run = read_run(folder)
    assert run.done == 20
    assert compare_digests(run) == ([], None)
    assert [row.realised is None for row in run.mix()] == [False, False, False, True, True, True]
    assert [stage.done for stage in run.stages()] == [12, 8, 0, 0]
    assert report.main([str(folder)]) == 0


def test_a_run_before_its_first_step_has_a_page(
    demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = record(demo_shards, tmp_path / "run", steps=10)
    (folder / "steps.jsonl").write_text("")
    (folder / "metrics.jsonl").unlink()
    (folder / "starts.jsonl").unlink()
    assert report.main([str(folder)]) == 0
    assert "digests: no step is logged in steps.jsonl" in capsys.readouterr().out
    assert "0 of 40" in (folder / "report.html").read_text()


def test_without_its_shards_the_report_says_that_digests_were_not_compared(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about = json.loads((folder / "config.json").read_text())
    about["settings"]["shards"] = str(folder / "gone")
    (folder / "config.json").write_text(json.dumps(about))
    assert report.main([str(folder)]) == 0
    assert "digests were not compared with the plan's: " in capsys.readouterr().out


def test_a_spike_of_one_step_among_many_is_drawn() -> None:
    loss = np.full(50_000, 3.0)
    loss[31_337] = 30.0
    svg = chart("loss", [Line("each step", np.arange(50_000), loss, 0, faint=True)], 50_000, "{:g}".format, (0, 30))
    path = re.search(r'<title>each step</title>\s*<path d="M([^"]*)"', svg)
    assert path is not None
    points = [point.split() for point in path[1].split("L")]
    assert min(float(y) for _, y in points) == pytest.approx(TOP)
    assert len(points) < 500


@pytest.mark.parametrize(("low", "high"), [(10.61, 10.82), (2.087, 2.112), (0.3, 9.7), (99.0, 1200.0)])
def test_the_labels_of_an_axis_differ_and_are_its_ticks(low: float, high: float) -> None:
    svg = chart("loss", [Line("loss", np.arange(50), np.linspace(high, low, 50), 0)], 50, None)
    labels = [text.replace("\N{MINUS SIGN}", "-") for text in re.findall(r"text-anchor: end[^>]*>([^<]*)<", svg)]
    assert len(set(labels)) == len(labels) > 1
    gaps = np.diff([float(label) for label in labels])
    assert gaps == pytest.approx([gaps[0]] * len(gaps))


@pytest.mark.parametrize(
    "name", ["</svg><script>", '" onload="x', r"$\frac{", "中文", "#0000a9", "title: \x1b[2J\u202e"]
)
def test_a_name_is_text_in_a_chart_whatever_it_is(name: str, recwarn: pytest.WarningsRecorder) -> None:
    line = Line(name, np.arange(2), np.ones(2), 0)
    svg = chart(name, [line], 2, None, cuts=[(0, name)], marks=[(1, name)])
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    shown = "".join(root.itertext())
    assert root.get("aria-label") == neutral(name)
    assert shown.count(neutral(name)) == 3
    assert {key for element in root.iter() for key in element.attrib} <= ATTRIBUTES
    assert not recwarn.list


def test_a_line_of_one_point_is_a_dot_and_one_of_none_is_not_there() -> None:
    lines = [Line("none", np.zeros(0, int), np.zeros(0), 0), Line("one", np.ones(1, int), np.ones(1), 1)]
    svg = chart("loss", lines, 2, None)
    assert svg.count("<use") == 1
    assert "var(--s1)" in svg


def test_shards_built_again_with_as_many_blocks_are_not_taken_for_the_runs(
    folder: Path, demo_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their digests, which are of blocks by number, would be the same."""
    shutil.copytree(demo_shards, tmp_path / "again")
    index, manifest = tmp_path / "again/it_culturax/train/index.json", tmp_path / "again/manifest.json"
    before, after = index.read_bytes(), index.read_bytes() + b"\n"
    index.write_bytes(after)
    old, new = (hashlib.sha256(data).hexdigest() for data in (before, after))
    rewrite(manifest, old, new)
    about = json.loads((folder / "config.json").read_text())
    about["settings"]["shards"] = str(tmp_path / "again")
    (folder / "config.json").write_text(json.dumps(about))
    assert report.main([str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"are not the run's: the index of it_culturax is {new[:12]}, it was {old[:12]}" in said
    assert "equal those" not in said


@pytest.mark.parametrize("first", [13, 30, 35])  # in the first phase, between the two, in the second
def test_a_branch_counts_what_came_before_its_first_step(
    folder: Path, first: int, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_run(folder)
    lines = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    (folder / "steps.jsonl").write_text("".join(lines[first:]))
    branch = read_run(folder)
    assert (branch.tokens, branch.passes()) == (whole.tokens, whole.passes())
    for phase in range(2):
        steps, away = whole.distances(phase)
        _, found = branch.distances(phase)
        assert found.tolist() == away[steps >= first].tolist()
    assert report.main([str(folder)]) == 0
    assert f"digests: all {40 - first} steps from step {first} on equal those computed" in capsys.readouterr().out
    assert f"digests of steps {first} to 39" in (folder / "report.html").read_text()


def test_a_run_of_before_indexes_were_recorded_has_a_report(folder: Path) -> None:
    about = json.loads((folder / "config.json").read_text())
    del about["indexes"]
    (folder / "config.json").write_text(json.dumps(about))
    assert report.main([str(folder)]) == 0


def test_what_damage_left_of_a_start_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder / "starts.jsonl").open("a") as file:
        file.write('[]\n{"from_step": 30}\n{"from_step": "30", "ranks": 1}\n\0\0\n{"from_step": 30, "ra')
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "starts (step, ranks): step 0 on 1, step 25 on 2"


def test_the_page_needs_nothing_from_outside_and_escapes_names(folder: Path) -> None:
    report.main([str(folder)])
    html = (folder / "report.html").read_text()
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert "src=" not in html
    assert "<b>run" not in html
    assert "&lt;b&gt;run" in html
    assert html.count("<svg") == 6
    for fact in ("ep0-ba40-rank0.pt", read_run(folder).digest, "2 ranks", "it_instructions", "5.500"):
        assert fact in html


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json there"),
        ("{", "is not one that train/main.py wrote"),
        ("{}", "is not one that"),
        ("[]", "is not one"),
    ],
)
def test_a_folder_without_a_run_is_a_user_error(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        report.main([str(tmp_path)])


@pytest.mark.parametrize(
    ("key", "value"), [("settings", None), ("block_len", 0), ("blocks", []), ("indexes", None), ("versions", 3)]
)
def test_an_edited_config_is_a_user_error(folder: Path, key: str, value: object) -> None:
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {key: value}))
    with pytest.raises(UserError, match="is not one that train"):
        report.main([str(folder)])


def test_metrics_that_are_no_numbers_are_left_out(folder: Path) -> None:
    lines = [{"step": 3, "throughput/tokens_per_sec": "fast"}, {"step": "4", "throughput/tokens_per_sec": 1.0}]
    write_lines(folder / "metrics.jsonl", [*lines, {"step": 5, "throughput/tokens_per_sec": 2.0}])
    assert [part.tolist() for part in read_run(folder).speed] == [[5], [2.0]]


def test_a_folder_as_the_page_is_a_user_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    before = sorted(folder.parent.rglob("*"))
    for out in (".", "", folder.name):
        with pytest.raises(UserError, match=r"cannot be written .*--out"):
            report.main([str(folder), "--out", out])
    assert sorted(folder.parent.rglob("*")) == before


def test_steps_missing_in_the_log_are_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (folder / "steps.jsonl").read_text().splitlines(keepends=True)
    damaged = [lines[7].replace('"loss"', '"los"'), lines[20].replace('"step": 20', '"step": 2000'), "\0\n"]
    (folder / "steps.jsonl").write_text("".join([*lines[:5], *damaged, *lines[8:20], *lines[10:12], *lines[23:]]))
    assert report.main([str(folder)]) == 0
    said = capsys.readouterr().out
    words = "steps.jsonl lacks 6 of the steps 0 to 39, the first is step 5"
    assert words in said
    assert "digests: all 34 steps equal" in said
    assert words in (folder / "report.html").read_text()
