"""An export serves what was trained: its base's files where the run changed none, else what the run trained with."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from chimera.chatml import CHAT_TEMPLATE
from chimera.cli import UserError
from chimera.train.export.folder import export
from chimera.train.export.proof import check_texts
from tests.convert.small_tokenizer import spec
from tests.train.exports import HEADERS, SIZES, check_card, with_special, write_base, write_checkpoint

CHAT = [{"role": "user", "content": "Ciao?"}]
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nSii utile.<|im_end|>\\n' }}{% endif %}"
)
CHATML_LINES = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
CHATML_LINES += "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
BOS = {"bos_token": "<s>", "eos_token": "<end>", "pad_token": "<pad>", "chat_template": HEADERS}


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def ends(folder: Path) -> Any:
    return json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")


def test_a_base_without_changes_keeps_its_files_byte_by_byte(tmp_path: Path) -> None:
    tokenizer = with_special("<end>", "<pad>", bos="<s>")
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    base = write_base(tmp_path / "base", tokenizer, BOS, bos_token_id=ids["<s>"], eos_token_id=ids["<end>"])
    generation = {"bos_token_id": ids["<s>"], "eos_token_id": ids["<end>"], "temperature": 0.6, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(generation))
    sample = Tokenizer.from_str(json.dumps(tokenizer)).encode("Il gatto dorme", add_special_tokens=False).ids
    model = {"pretrained": str(base)}
    file = write_checkpoint(
        tmp_path, tokenizer, model, {"web": "text"}, eos="<end>", pad="<pad>", samples=[sample, [ids["<s>"]]]
    )
    export(file, out := tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (base / name).read_bytes(), name
    assert (out / "chat_template.jinja").read_text() == HEADERS
    kept, config = (json.loads((folder / "config.json").read_text()) for folder in (base, out))
    for key in ("max_position_embeddings", "bos_token_id", "eos_token_id", "vocab_size"):
        assert config[key] == kept[key], key
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(out)("Il gatto dorme").input_ids == [ids["<s>"], *sample]
    assert "It goes on from `base`" in card(out)
    assert check_card(base, out) == []
    assert "but for" not in card(out)
    assert "- `chat_template.jinja`: added" in card(out)
    assert "- `config.json`: added `" in card(out)
    assert "Its tokenizer puts `<s>` around a text; the texts it went on with had none." in card(out)
    assert "trained on texts alone" in card(out)


@pytest.mark.parametrize(
    ("template", "kept"),
    [(CHATML_LINES, True), (CHAT_TEMPLATE, True), (DEFAULT_SYSTEM + CHATML_LINES, False), (None, False)],
)
def test_a_template_is_the_bases_unless_chats_were_trained_in_another(
    tmp_path: Path, template: str | None, kept: bool
) -> None:
    """One of ChatML that ends in a newline asks the model the same; one with a default system text does not."""
    base = write_base(
        tmp_path / "base", json.loads(spec()), {**CHATML, **({"chat_template": template} if template else {})}
    )
    model = {"pretrained": str(base)}
    export(write_checkpoint(tmp_path, json.loads(spec()), model, {"chat": "chatml"}), out := tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nCiao?<|im_end|>\n<|im_start|>assistant\n"
    assert ("the chat template: ChatML, as was trained" in check_card(base, out)) != kept
    found = json.loads((out / "tokenizer_config.json").read_text())
    assert found["chat_template"] == (out / "chat_template.jinja").read_text() == (template if kept else CHAT_TEMPLATE)
    assert (found["eos_token"], found["pad_token"]) == ("<|im_end|>", "<|endoftext|>")
    # the configuration that the base's weights came with names <|endoftext|>; turns end too
    assert ends(out) == [0, 3]
    assert "- generation_config.json: `<|im_end|>` end" in card(out)
    made = AutoModelForCausalLM.from_pretrained(out)
    assert made.generation_config.eos_token_id == [0, 3]


def test_texts_alone_leave_a_bases_template(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", json.loads(spec()), {**CHATML, "chat_template": DEFAULT_SYSTEM + CHATML_LINES})
    formats = {"web": "text"}
    export(write_checkpoint(tmp_path, json.loads(spec()), {"pretrained": str(base)}, formats), out := tmp_path / "out")
    assert (out / "chat_template.jinja").read_text() == DEFAULT_SYSTEM + CHATML_LINES
    assert (out / "tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


def test_a_template_stands_where_older_readers_look_too(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", json.loads(spec()), CHATML)
    (base / "chat_template.jinja").write_text(CHATML_LINES)
    formats = {"web": "text"}
    export(write_checkpoint(tmp_path, json.loads(spec()), {"pretrained": str(base)}, formats), out := tmp_path / "out")
    assert json.loads((out / "tokenizer_config.json").read_text())["chat_template"] == CHATML_LINES
    assert (out / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert "- tokenizer_config.json: it also holds the chat template" in card(out)
    check_card(base, out)


def test_a_grown_vocabulary_is_named_and_the_bases_bos_kept(tmp_path: Path) -> None:
    tokenizer = with_special("<end>", "<pad>", bos="<s>")
    base = write_base(tmp_path / "base", tokenizer, BOS)
    grown = json.loads(json.dumps(tokenizer))
    more = {**grown["added_tokens"][-1], "id": grown["added_tokens"][-1]["id"] + 1, "content": "<new>"}
    grown["added_tokens"].append(more)
    grown["post_processor"] = None
    model = {"pretrained": str(base)}
    export(write_checkpoint(tmp_path, grown, model, {"web": "text"}, eos="<end>", pad="<pad>"), out := tmp_path / "out")
    ids = AutoTokenizer.from_pretrained(out)("<new>").input_ids
    assert ids == [more["id"] - 1, more["id"]]
    assert "- the vocabulary: 1 token more (`<new>`)" in card(out)
    check_card(base, out)


def test_from_nothing_a_text_has_no_bos_and_a_template_only_if_chats_were_trained(tmp_path: Path) -> None:
    """A tokenizer.json of elsewhere with a BOS, a truncation and a padding: none of these touched a training text."""
    tokenizer = with_special(bos="<s>")
    tokenizer["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    pad = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 1, "pad_type_id": 0, "pad_token": "<|padding|>"}
    tokenizer["padding"] = {"strategy": {"Fixed": 8}, **pad}
    export(write_checkpoint(tmp_path, tokenizer, SIZES, {"web": "text"}), out := tmp_path / "out")
    read = AutoTokenizer.from_pretrained(out)
    text = "Il gatto dorme sotto l'albero e la pioggia cade"
    ids = Tokenizer.from_str(spec()).encode(text, add_special_tokens=False).ids
    assert len(ids) > 8
    assert read(text).input_ids == ids
    assert read.chat_template is None
    assert not (out / "chat_template.jinja").exists()
    assert (ends(out), read.model_max_length) == ([0], 64)
    export(write_checkpoint(tmp_path, tokenizer, SIZES, {"chat": "chatml"}), both := tmp_path / "both")
    config = json.loads((both / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (both / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert ends(both) == [0, 3]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_that_the_umask_gives(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        export(write_checkpoint(tmp_path, json.loads(spec()), SIZES, {"web": "text"}), out := tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in out.iterdir()} == {0o666 & ~mask}
    assert out.stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_longer_context_than_the_bases_is_named_where_it_was_trained(tmp_path: Path) -> None:
    base = write_base(
        tmp_path / "base", json.loads(spec()), {**CHATML, "model_max_length": 32}, max_position_embeddings=32
    )
    model = {"pretrained": str(base)}
    file = write_checkpoint(tmp_path, json.loads(spec()), model, {"web": "text"}, seq_len=64)
    export(file, out := tmp_path / "out")
    assert json.loads((out / "config.json").read_text())["max_position_embeddings"] == 64
    assert AutoTokenizer.from_pretrained(out).model_max_length == 64
    assert "- the context length: 64 tokens, as was trained; the configuration named 32" in card(out)
    check_card(base, out)


def test_large_weights_are_cut_into_several_files(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, json.loads(spec()), SIZES, {"web": "text"})
    export(file, out := tmp_path / "out", shard="20KB")
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 1
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        # what the shards hold cannot be what this tokenizer gives: ids of a prefix space, say
        ("normalizer", r"nothing is exported: its tokenizer gives .* other ids than the shards have"),
        ("template", r"nothing is exported: its chat template writes"),
        ("ends", r"nothing is exported: `generate` goes on after token 3"),
    ],
)
def test_what_would_serve_something_else_is_not_exported(
    tmp_path: Path, sample: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from chimera.train.export import folder, tokenizer

    def spoil(*args: Any) -> tokenizer.Spoken:
        found = tokenizer.spoken(*args)
        if sample == "normalizer":
            found.write_json("tokenizer.json", {**found.json("tokenizer.json"), "normalizer": {"type": "Lowercase"}})
        if sample == "template":
            found.files["chat_template.jinja"] = HEADERS.encode()
        if sample == "ends":
            found.write_json("generation_config.json", {"eos_token_id": 0, "pad_token_id": 1})
        return found

    monkeypatch.setattr(folder, "spoken", spoil)
    file = write_checkpoint(tmp_path, json.loads(spec()), SIZES, {"chat": "chatml"})
    with pytest.raises(UserError, match=message):
        export(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_a_text_that_lacks_the_bos_it_had_in_training_is_not_exported() -> None:
    about = {"tokenizer": spec(), "base": {"name": "base", "files": {}}, "bos": [5]}
    with pytest.raises(UserError, match=r"its tokenizer puts \[\] around a text, \[5\] began each"):
        check_texts(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(spec())), about)


def test_dtype_auto_is_the_bases_else_that_of_training(tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, json.loads(spec()), SIZES, {"web": "text"})
    state = torch.load(file)
    state["state"]["callbacks"]["About"]["about"]["precision"] = "amp_bf16"
    torch.save(state, file)
    export(file, tmp_path / "auto")
    export(file, tmp_path / "asked", "float32")
    types = [json.loads((tmp_path / name / "config.json").read_text())["dtype"] for name in ("auto", "asked")]
    assert types == ["bfloat16", "float32"]
