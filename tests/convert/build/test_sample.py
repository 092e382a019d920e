"""`build_shards.py CONFIG sample=N`: documents as they will be trained, and nothing is built."""

import json
from pathlib import Path

import pytest

from chimera.cli import UserError
from chimera.commands import build_shards
from chimera.text import marked
from tests.convert import builds
from tests.convert.encode.test_tokenizers import BOS, with_bos


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.json").write_text(json.dumps(with_bos()))
    (tmp_path / "texts.jsonl").write_bytes(builds.jsonl({"text": text} for text in ("no", "Il gatto\x1b[2J", "È vero")))
    asked = [{"role": "user", "content": "Chi?"}, {"role": "assistant", "content": "Il gatto."}]
    again = [{"role": "user", "content": "Dove?"}, {"role": "assistant", "content": "Sul tetto. " * 9}]
    long = [{**again[1], "weight": 0} if turn is again[1] else turn for turn in again] + again
    rows = [{"messages": messages} for messages in (asked, long, asked + again, asked)]
    (tmp_path / "chats.jsonl").write_bytes(builds.jsonl(rows))
    chat = {"format": "chatml", "packing": "none", "too_long": "turns"}
    streams = {
        "texts": {"min_chars": 0, "min_tokens": 3, "sources": [{"files": [f"{tmp_path}/texts.jsonl"]}]},
        "chats": {**chat, "min_tokens": 1, "sources": [{"files": [f"{tmp_path}/chats.jsonl"]}]},
    }
    settings = builds.config(tmp_path, tmp_path / "out", tokenizer={"path": str(tmp_path)}, streams=streams)
    (tmp_path / "shards.yaml").write_text(json.dumps(settings))
    return tmp_path / "shards.yaml"


def test_a_sample_shows_documents_as_they_will_be_trained(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = builds.tree(config.parent)
    assert build_shards.main([str(config), "sample=2"]) == 0
    _, *shown = capsys.readouterr().out.split("── ")
    assert builds.tree(config.parent) == before
    asked = "<|im_start|>user\nChi?<|im_end|>\n<|im_start|>assistant\n⟦Il gatto.<|im_end|>⟧<|endoftext|>\n"
    _, _, whole, short = shown = [part for part in shown if " ──\n" in part]
    assert [part.partition(" ──\n")[2] for part in shown] == [
        f"{BOS}⟦Il gatto\ufffd[2J<|endoftext|>⟧\n",  # `no` has too few tokens
        f"{BOS}⟦È vero<|endoftext|>⟧\n",
        *(asked, asked),  # of the next no trained answer fits, of this one the first
    ]
    assert whole.startswith("chats, document 1: ")
    assert "too long" not in whole
    assert short.startswith("chats, document 2: ")
    assert short.partition(" ──")[0].endswith(" tokens, too long: turns")


def test_what_is_trained_is_in_color_on_a_terminal() -> None:
    assert (
        marked([1, 2, 3], [False, True, True], lambda ids: f"{ids}\x1b", color=True)
        == "[1]\ufffd\x1b[32m[2, 3]\ufffd\x1b[0m"
    )


@pytest.mark.parametrize("words", [["sample=0"], ["sample=x"], ["sample=1", "sample=2"]])
def test_a_sample_of_no_number_is_one_line(config: Path, words: list[str]) -> None:
    with pytest.raises(UserError, match="a number of documents, at least 1"):
        build_shards.main([str(config), *words])
