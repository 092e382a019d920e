"""Odd bases, checkpoints of anybody, places that cannot be written: one line and nothing there, or what was trained."""

import fcntl
import json
import os
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from chimera.cli import UserError
from chimera.commands import export_hf
from chimera.train.export.folder import export
from chimera.train.run.checkpoint_file import read_checkpoint
from chimera.train.step.base import check_files, check_pretrained
from tests.convert.small_tokenizer import spec
from tests.train.exports import SIZES, check_card, write_base, write_checkpoint

CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
LINES = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
LINES += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CONFIG = "tokenizer_config.json"


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def of_base(folder: Path, spoil: Callable[[Path], object], kind: str = "text") -> Path:
    """A checkpoint that goes on from a base which is spoiled before."""
    base = write_base(folder / "base", json.loads(spec()), CHATML)
    spoil(base)
    return write_checkpoint(folder, json.loads(spec()), {"pretrained": str(base)}, {"web": kind})


def change(file: Path, act: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint with another content."""
    state = torch.load(file, weights_only=True)
    act(state["state"])
    torch.save(state, file)
    return file


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (CONFIG, b"[1]", "Input should be"),
        (CONFIG, b"", "cannot be read"),
        (CONFIG, b"\xff\xff", "cannot be read"),
        (CONFIG, b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}", "cannot be read"),
        (CONFIG, b'{"chat_template": [1]}', "`chat_template`: "),
        (CONFIG, b'{"chat_template": [{"name": "default"}]}', "`chat_template`: "),
        (CONFIG, b'{"model_max_length": "64"}', "`model_max_length`: "),
        (CONFIG, b'{"added_tokens_decoder": [1]}', "`added_tokens_decoder`: "),
        (CONFIG, b'{"eos_token": 5}', "`eos_token`: "),
        ("generation_config.json", b'{"eos_token_id": "x"}', "`eos_token_id`: "),
        ("generation_config.json", b'{"eos_token_id": [1.5]}', "`eos_token_id`: "),
        ("generation_config.json", b'{"eos_token_id": 1' + b"0" * 40 + b"}", "`eos_token_id`: "),
        ("generation_config.json", b'{"eos_token_id": 1' + b"0" * 5000 + b"}", "cannot be read"),
        ("special_tokens_map.json", b"[]", "Input should be"),
        ("chat_template.jinja", b"\xff", "cannot be read"),
        ("../out/x.jinja", b"", "is no file of a model folder"),
        ("additional_chat_templates/../../x.jinja", b"", "is no file of a model folder"),
        ("/etc/x.jinja", b"", "is no file of a model folder"),
        ("modeling.py", b"", "is no file of a model folder"),
    ],
)
def test_a_base_that_no_export_could_read_is_refused_before_the_first_step(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        check_files({name: data}, "it")
    if "/" not in name and not name.endswith(".py"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"setting `model.pretrained`: .*{name}.*{message}"):
            check_pretrained(str(tmp_path), tmp_path / "none.json")


def test_files_of_a_checkpoint_become_no_paths(tmp_path: Path) -> None:
    def spoil(state: dict[str, Any]) -> None:
        state["callbacks"]["About"]["about"]["base"]["files"]["../../escaped.jinja"] = b"x"

    file = change(of_base(tmp_path / "run", lambda _: None), spoil)
    with pytest.raises(UserError, match=r"escaped.jinja' is no file of a model folder"):
        export(file, tmp_path / "run" / "out")
    assert not list(tmp_path.rglob("escaped*"))
    assert not list(tmp_path.rglob(".out*"))


def test_older_readers_get_the_trained_template_of_a_base_that_has_two(tmp_path: Path) -> None:
    def spoil(base: Path) -> None:
        edit(base / CONFIG, chat_template="{{ messages }}")
        (base / "chat_template.jinja").write_text(LINES)

    export(of_base(tmp_path, spoil, "chatml"), out := tmp_path / "out")
    assert json.loads((out / CONFIG).read_text())["chat_template"] == (out / "chat_template.jinja").read_text() == LINES
    assert "tokenizer_config.json: the chat template of chat_template.jinja, as was trained" in check_card(
        tmp_path / "base", out
    )


def test_an_export_names_no_code_that_it_does_not_hold(tmp_path: Path) -> None:
    def spoil(base: Path) -> None:
        edit(base / CONFIG, auto_map={"AutoTokenizer": ["code.A", "code.B"]}, tokenizer_class="OwnTokenizer")
        edit(base / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"})
        (base / "added_tokens.json").write_bytes(b"{}")
        (base / "vocab.txt").write_bytes(b"")  # empty, which a pickle writes as a call

    export(of_base(tmp_path, spoil), out := tmp_path / "out")
    assert AutoTokenizer.from_pretrained(out)("Ciao").input_ids
    assert not [file for file in out.glob("*.json") if "auto_map" in file.read_text()]
    assert check_card(tmp_path / "base", out)
    assert (out / "vocab.txt").read_bytes() == b""


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_hidden_layers", 10**9, r"1000000000 layers, and \d+ weights"),
        ("hidden_size", 1 << 30, "does not fit its weights"),
        ("vocab_size", 1 << 40, "does not fit its weights"),
        ("num_attention_heads", 0, "does not fit its weights"),
        ("model_type", "none", "does not fit its weights"),
        ("hidden_size", "x", "does not fit its weights"),
    ],
)
def test_sizes_that_a_checkpoint_claims_are_those_of_its_weights(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    def spoil(state: dict[str, Any]) -> None:
        about = state["callbacks"]["About"]["about"]
        about["model_config"] = json.dumps({**json.loads(about["model_config"]), key: value})

    file = change(write_checkpoint(tmp_path, json.loads(spec()), SIZES, {"web": "text"}), spoil)
    with pytest.raises(UserError, match=message):
        export(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", ["tensor", "packed", "directory"])
def test_a_checkpoint_that_claims_more_than_it_holds_is_not_read(tmp_path: Path, way: str) -> None:
    """torch 2.7 reads on behind the end of a record that is shorter than its tensor."""
    torch.save({"state": {"a": torch.arange(200)}}, tmp_path / "plain.pt")
    kind = zipfile.ZIP_DEFLATED if way == "packed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "plain.pt") as old, zipfile.ZipFile(tmp_path / "new.pt", "w", kind) as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl") and way == "tensor":
                assert b"K\xc8" in data
                data = data.replace(b"K\xc8", b"J\xff\xff\xff\x7f")
            new.writestr(name, data)
    if way == "directory":
        data = (tmp_path / "new.pt").read_bytes()
        (tmp_path / "new.pt").write_bytes(data.replace((1600).to_bytes(4, "little"), (1 << 30).to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"not a checkpoint that can be read: (a tensor|its parts)"):
        read_checkpoint(tmp_path / "new.pt")


def test_what_a_killed_export_left_is_removed_and_one_at_work_is_not_disturbed(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, json.loads(spec()), SIZES, {"web": "text"})
    left, out = tmp_path / ".mio modèllo.export", tmp_path / "mio modèllo"
    (left / "deep").mkdir(parents=True)
    (left / "deep" / "model.safetensors").write_bytes(b"x")
    descriptor = os.open(left, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="is being written by another export"):
        export_hf.main([str(file), str(out)])
    assert (left / "deep").exists()
    os.close(descriptor)
    assert export_hf.main([str(file), str(out)]) == 0
    assert not left.exists()
    assert not (out / "deep").exists()
    assert json.loads((out / "config.json").read_text())["model_type"] == "llama"


def test_what_comes_to_the_place_meanwhile_stays(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, json.loads(spec()), SIZES, {"web": "text"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "theirs").touch()
    with pytest.raises(UserError, match="was written by something else meanwhile"):
        export(file, tmp_path / "out")
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]


def test_a_place_that_cannot_be_replaced_is_refused_and_a_link_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_checkpoint(tmp_path, json.loads(spec()), SIZES, {"web": "text"})
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="cannot be replaced by an export"):
        export_hf.main([str(file), "."])
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert export_hf.main([str(file), "../link"]) == 0
    assert (tmp_path / "real" / "config.json").exists()
    assert (tmp_path / "link").is_symlink()


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, json.loads(spec()), SIZES, {"web": "text"})
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount here")
    try:
        with pytest.raises(UserError, match=r"the weights cannot be written in .*No space left.*: make room"):
            export(file, disk / "out")
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", str(disk)], check=True)
