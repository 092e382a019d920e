"""A tokenizer trained from a shards config: deterministic, loadable, on the fast path, never replaced unasked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chimera.cli import UserError
from chimera.commands import train_tokenizer
from chimera.convert.encode.document import Document
from chimera.convert.encode.documents import DocumentReader
from chimera.convert.encode.encoding import Encoder
from chimera.convert.settings import TokenizerSettings
from chimera.convert.stream_settings import StreamSettings
from tests.convert.builds import ROOT

PAIR = {"instruction": "Che cosa è la marea?", "input": "", "output": "La marea è il salire e scendere del mare."}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    texts = [f"Il mulino numero {i} macina il grano con la forza dell'acqua o del vento." for i in range(50)]
    lines = [json.dumps({"text": text}) for text in texts] + ["{broken", json.dumps({"text": "short"})]
    (tmp_path / "text.jsonl").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(PAIR) + "\n")
    file = tmp_path / "shards.yaml"
    streams = {
        "text": {"format": "text", "sources": [{"files": [str(tmp_path / "text.jsonl")]}]},
        "pairs": {"format": "chatml", "sources": [{"files": [str(tmp_path / "pairs.jsonl")]}]},
    }
    settings = {"output": str(tmp_path / "out"), "tokenizer": {"path": str(tmp_path / "tok")}, "streams": streams}
    file.write_text(json.dumps(settings))
    return file


def test_the_special_tokens_come_first_and_the_fast_path_holds(config: Path, tmp_path: Path) -> None:
    assert train_tokenizer.main([str(config), "vocab_size=300"]) == 0
    encoder = Encoder.from_settings(TokenizerSettings(path=str(tmp_path / "tok")))
    assert encoder.special_ids == {"<|endoftext|>": 0, "<|padding|>": 1, "<|im_start|>": 2, "<|im_end|>": 3}
    assert (encoder.path, encoder.vocab_size) == ("fastokens", 300)
    ((ids, _),) = encoder.encode([Document((b"Il mulino",))])
    assert len(ids) < len("Il mulino")


def test_the_same_sources_give_the_same_tokenizer(config: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer.main([str(config), "vocab_size=500", f"tokenizer.path={tmp_path / name}/tokenizer.json"])
    chat = ["streams.pairs.format=chat", "streams.pairs.template=tokenizer"]  # which has no template yet
    train_tokenizer.main([str(config), "vocab_size=500", f"tokenizer.path={tmp_path}/c/tokenizer.json", *chat])
    assert len({(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b", "c")}) == 1


def test_transformers_finds_the_ends_and_renders_chats_as_they_are_stored(config: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    train_tokenizer.main([str(config), "vocab_size=300"])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert (theirs.eos_token_id, theirs.pad_token_id) == (0, 1)
    encoder = Encoder.from_settings(TokenizerSettings(path=str(tmp_path / "tok")))
    document = DocumentReader(StreamSettings(format="chatml"), encoder.special_ids).read(PAIR)
    assert isinstance(document, Document)
    ((ids, _),) = encoder.encode([document])
    messages = [
        {"role": "user", "content": PAIR["instruction"]},
        {"role": "assistant", "content": PAIR["output"]},
    ]
    assert theirs.apply_chat_template(messages, return_dict=False) == ids[:-1].tolist()
    prompt = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert ids[: len(prompt)].tolist() == prompt


def test_an_existing_tokenizer_is_replaced_only_when_told(config: Path, tmp_path: Path) -> None:
    train_tokenizer.main([str(config), "vocab_size=300"])
    before = (tmp_path / "tok" / "tokenizer.json").read_bytes()
    with pytest.raises(UserError, match="overwrite=true"):
        train_tokenizer.main([str(config), "vocab_size=280"])
    assert (tmp_path / "tok" / "tokenizer.json").read_bytes() == before
    train_tokenizer.main([str(config), "vocab_size=280", "overwrite=true"])
    assert (tmp_path / "tok" / "tokenizer.json").read_bytes() != before


def test_a_full_disk_is_one_line_and_leaves_no_torn_tokenizer(config: Path, tmp_path: Path) -> None:
    disk = tmp_path / "tok"
    disk.mkdir()
    command = f"{sys.executable} convert/train_tokenizer.py {config} vocab_size=400"
    script = f"mount -t tmpfs -o size=12k tmpfs {disk} || exit 77; {command}; echo code=$?; ls -A {disk}"
    found = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode == 77 or "unshare" in found.stderr:
        pytest.skip("no user namespaces with mounts here")
    assert found.stdout.split() == ["code=2", "tokenizer_config.json"], found.stderr
    assert "No space left on device: give another place" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["vocab_size=100"], "vocab_size: 100 must be at least 260"),
        (["streams.text.min_chars=1000"], "streams.text: its source holds no usable document"),
        (["streams.text.sources.0.files=[nowhere.jsonl]"], "no file at nowhere.jsonl"),
        (["vocabsize=300"], "vocabsize"),
        (["min_frequency=-1"], "`min_frequency` is -1; it must be at least 0"),
        (["chars_per_stream=0"], "`chars_per_stream` is 0; it must be at least 1"),
        (["vocab_size=300", "tokenizer.pad_token=<|endoftext|>"], "are both '<|endoftext|>': they must differ"),
        (["vocab_size=300", "tokenizer.eos_token=a"], "takes bytes of plain text as the special token 'a'"),
    ],
)
def test_mistakes_are_named(config: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_tokenizer.main([str(config), *overrides])
    assert not (tmp_path / "tok").exists()
