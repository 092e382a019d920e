"""steps.jsonl after a resume holds exactly the steps before it."""

import json

from train.monitor import keep_steps


def lines(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_lines_past_the_checkpoint_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(8)) + '{"step": 8, "di')
    keep_steps(path, 5)
    assert lines(path) == [0, 1, 2, 3, 4]
    keep_steps(path, 5)
    assert lines(path) == [0, 1, 2, 3, 4]


def test_a_torn_line_alone_is_dropped(tmp_path):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}')
    keep_steps(path, 2)
    assert lines(path) == [0]


def test_missing_steps_are_said(tmp_path, capsys):
    path = tmp_path / "steps.jsonl"
    path.write_text('{"step": 0}\n{"step": 3}\n')
    keep_steps(path, 6)
    said = capsys.readouterr().err
    assert "goes from step 0 to 3" in said
    assert "ends at step 3, the checkpoint at 5" in said
    assert lines(path) == [0, 3]


def test_no_file_is_no_matter(tmp_path):
    keep_steps(tmp_path / "steps.jsonl", 5)
    assert not (tmp_path / "steps.jsonl").exists()
