"""inspect_batch.py: the same steps as plan.py counts and steps.jsonl recorded, and their text."""

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chimera.cli import UserError
from chimera.commands import inspect_batch, plan
from chimera.commands.train import main as train
from tests.train.conftest import steps_of

Overrides = Callable[..., list[str]]


@pytest.fixture
def look(overrides: Overrides, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def look(*words: str) -> Any:
        inspect_batch.main([*overrides("run"), *words])
        out = capsys.readouterr().out
        return json.loads(out) if "--json" in words else out

    return look


def test_plan_inspect_and_steps_jsonl_agree_over_a_phase_change(
    overrides: Overrides, look: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(overrides("run", "max_duration=24ba"))
    capsys.readouterr()
    plan.main([*overrides("run"), "--json"])
    planned = json.loads(capsys.readouterr().out)
    totals: Counter[str] = Counter()
    for line in steps_of(tmp_path / "run"):
        seen = look(f"step={line['step']}", "--json")
        assert [seen[key] for key in ("step", "phase", "seq_len", "digest")] == [
            line[key] for key in ("step", "phase", "seq_len", "digest")
        ]
        counts = Counter(block["stream"] for block in seen["blocks"])
        assert {name: 128 * counts[name] for name in line["streams"]} == line["streams"]
        for block in seen["blocks"]:
            assert block["position"] == totals[block["stream"]]  # a running count
            totals[block["stream"]] += 1
        if line["step"] + 1 in (8, 16, 20):  # a segment's end
            done = [segment for segment in planned["segments"] if segment["last_step"] <= line["step"]]
            assert totals == Counter({n: sum(s["streams"][n] for s in done) for n in planned["streams"]})


def test_text_is_cut_at_sequences_and_documents(look: Callable[..., Any]) -> None:
    seen = look("step=9", "--json", "--decode")
    for block in seen["blocks"]:
        assert len(block["text"]) == 128 // seen["seq_len"]
        for texts in block["text"]:
            assert all("<|endoftext|>" not in text[: -len("<|endoftext|>")] for text in texts)
            assert all(text.endswith("<|endoftext|>") for text in texts[:-1] if "tokens of padding" not in texts[-1])
    chats = [" ".join(itertools.chain(*b["text"])) for b in seen["blocks"] if b["stream"] == "it_instructions"]
    assert all("<|im_start|>" in chat for chat in chats)
    out = look("step=9", "--decode")
    assert out.startswith(f"step 9: phase knowledge, sequences of 64 tokens, 8 blocks, digest {seen['digest']}\n")
    assert out.count("── sequence") == 16


def test_the_mask_shows_what_is_trained_on(look: Callable[..., Any]) -> None:
    said = look("step=25", "--json", "--mask", "train_on=assistant")
    every = look("step=25", "--json", "--mask")
    plain = look("step=25", "--json", "--decode")
    for one, other, bare in zip(said["blocks"], every["blocks"], plain["blocks"], strict=True):
        for block in (one, other):  # brackets alone are new
            texts = [[text.translate({ord("⟦"): "", ord("⟧"): ""}) for text in seq] for seq in block["text"]]
            assert texts == bare["text"]
        if one["stream"] == "it_instructions":
            text = "".join(itertools.chain(*one["text"]))
            assert "assistant\n⟦" in text
            assert "<|im_end|>⟧<|endoftext|>" in text
            assert "<|im_start|>" not in re.sub("[^⟦]*⟦([^⟧]*)⟧", r"\1", text.rpartition("⟧")[0] + "⟧")
        else:
            assert one["text"] == other["text"]
        documents = [text for texts in other["text"] for text in texts if "tokens of padding" not in text]
        assert all(text.index("⟦") > 0 and text.endswith("⟧") for text in documents if len(text) > 40)
    out = look("step=25", "--mask")
    assert "⟦" in out
    assert "\x1b" not in out


def test_shards_built_again_since_the_run_are_said(
    overrides: Overrides, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*overrides("run"), "step=0", "--json"]
    index = "0" * 64
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"indexes": {"it_culturax": index}}))
    inspect_batch.main(words)
    assert f"are not those of the run in {tmp_path}/run: the index of it_culturax is" in capsys.readouterr().err
    for torn in ('{"indexes": {"it_cul', "[]"):
        (tmp_path / "run/config.json").write_text(torn)
        inspect_batch.main(words)
        assert capsys.readouterr().err == ""


def test_padding_is_no_document() -> None:
    block = {"stream": "s", "position": 0, "pass": 0, "shard": 0, "block": 0}
    texts = ["a", "b", "[13 tokens of padding]"]
    about = {"step": 0, "phase": "p", "seq_len": 8, "digest": "d", "blocks": [{**block, "text": [texts]}]}
    assert [line.strip() for line in inspect_batch.lines(about)[3:]] == ["a", "┄┄ next document ┄┄", *texts[1:]]


def test_text_cannot_steer_the_terminal() -> None:
    about = {"step": 0, "phase": "p", "seq_len": 8, "digest": "d", "blocks": []}
    block = {"stream": "s", "position": 0, "pass": 0, "shard": 0, "block": 0, "text": [["a\x1b[2Jb\x9bc\td\r"]]}
    shown = "\n".join(inspect_batch.lines({**about, "blocks": [block]}))
    assert "a\ufffd[2Jb\ufffdc\td\ufffd" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], r"which step\? Give step=N"),
        (["step=-1"], r"which step\?"),
        (["step=1", "step=2"], r"which step\?"),
        (["step=30"], "step 30 is outside of the plan's steps 0 to 29"),
        (["step=0", "shards=/nowhere"], "no shards at /nowhere"),
    ],
)
def test_a_wrong_step_or_place_is_one_line(look: Callable[..., Any], words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        look(*words)
