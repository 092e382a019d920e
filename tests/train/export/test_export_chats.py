"""An export speaks the chat template that its streams were written with, proven on the samples beside the shards."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from chimera.chatml import CHAT_TEMPLATE
from chimera.cli import UserError
from chimera.proof_file import unpack
from chimera.train.data.shards import Shards, open_shards
from chimera.train.export.folder import export
from tests.convert import builds
from tests.convert.encode.chat_families import FAMILIES, Family
from tests.convert.small_tokenizer import EOS, PAD
from tests.train.exports import SIZES, checkpoint_of, write_base

CHAT = [{"role": "user", "content": "Che ora è?"}, {"role": "assistant", "content": "Mezzogiorno."}]
ENDS = {"qwen": "<|im_end|>", "gpt_oss": "<|return|>", "phi": "<|end|>", "llama": "<|eot_id|>", "smol": "<|im_end|>"}
ENDS |= {"gemma": "<end_of_turn>", "deepseek": "<｜end｜>", "zephyr": "</s>"}


def built(folder: Path, family: Family, **streams: Any) -> Shards:
    """Shards of a chat stream of a family, in blocks of 128 tokens, and of more streams of the same conversations."""
    rows = [{"messages": [*CHAT, {"role": "user", "content": f"E {n}?"}, CHAT[1]]} for n in range(12)]
    (folder / "in.jsonl").write_bytes(builds.jsonl(rows))
    chat = {"format": "chat", "packing": "none", "min_tokens": 1, "sources": [{"files": [str(folder / "in.jsonl")]}]}
    tokenizer = {"path": str(family.write(folder / "tokenizer")), "eos_token": family.eos, "pad_token": PAD}
    streams = {"chat": {"template": "tokenizer"}, **streams}
    named = {name: {**chat, **more} for name, more in streams.items()}
    given = builds.config(folder, folder / "shards", streams=named, tokenizer=tokenizer, eval_fraction=0)
    builds.build_here({**given, "block_len": 128})
    return open_shards(str(folder / "shards"), str(folder / "cache"))


def config_of(folder: Path, name: str = "tokenizer_config.json") -> dict[str, Any]:
    return dict(json.loads((folder / name).read_bytes()))


@pytest.mark.parametrize("name", sorted(ENDS))
def test_from_nothing_an_export_speaks_the_template_that_was_trained(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    shards = built(tmp_path, family)
    export(checkpoint_of(shards, tmp_path, SIZES), out := tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    line = next(unpack((tmp_path / "shards/proof/chat.jsonl.zst").read_bytes()))
    prompt = tokenizer.apply_chat_template(line["messages"][:1], add_generation_prompt=True, return_dict=False)
    if "strftime_now" not in family.template:
        assert prompt == line["ids"][: line["mask"].index(1)]
        assert tokenizer.apply_chat_template(line["messages"], tokenize=False) == line["text"]
    assert config_of(out)["chat_template"] == (out / "chat_template.jinja").read_text() == family.template
    ends = sorted({tokenizer.convert_tokens_to_ids(token) for token in (family.eos, ENDS[name])})
    assert config_of(out, "generation_config.json")["eos_token_id"] == ends
    assert "written by its tokenizer's chat template" in (out / "README.md").read_text()


def test_the_template_of_a_base_is_kept_byte_by_byte_where_chats_were_trained_in_it(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    shards = built(tmp_path, family)
    spec = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    named = {"eos_token": "<|eot_id|>", "pad_token": PAD, "bos_token": "<|begin|>"}
    base = write_base(tmp_path / "base", spec, {**named, "chat_template": family.template})
    export(checkpoint_of(shards, tmp_path, {"pretrained": str(base)}), out := tmp_path / "out")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (base / file).read_bytes()
    assert "the chat template:" not in (out / "README.md").read_text()


def test_a_base_that_lacks_what_the_template_names_gets_it(tmp_path: Path) -> None:
    family = FAMILIES["llama"]
    shards = built(tmp_path, family)
    spec = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    base = write_base(tmp_path / "base", spec, {"eos_token": EOS, "pad_token": PAD, "chat_template": family.template})
    export(checkpoint_of(shards, tmp_path, {"pretrained": str(base)}), out := tmp_path / "out")
    assert config_of(out)["bos_token"] == "<|begin|>"
    assert "- tokenizer_config.json: `bos_token` is `<|begin|>`" in (out / "README.md").read_text()


def test_of_two_templates_one_is_named(tmp_path: Path) -> None:
    shards = built(tmp_path, FAMILIES["qwen"], lines={"template": "chatml"})
    file = checkpoint_of(shards, tmp_path, SIZES)
    with pytest.raises(UserError, match=r"more than one template.*give `--template STREAM` .*\(one of chat, lines\)"):
        export(file, tmp_path / "out")
    with pytest.raises(UserError, match="--template web: no chats"):
        export(file, tmp_path / "out", template="web")
    export(file, tmp_path / "out", template="chat")
    assert (tmp_path / "out/chat_template.jinja").read_text() == FAMILIES["qwen"].template
    assert "Those of lines had another template." in (tmp_path / "out/README.md").read_text()


def test_conversations_that_would_be_served_otherwise_end_the_export(tmp_path: Path) -> None:
    """A base's template that is ChatML in all that is asked of it at first, and another later."""
    family = FAMILIES["smol"]
    shards = built(tmp_path, family, chat={"template": "chatml"})
    other = CHAT_TEMPLATE.replace("{% for", "{% if messages|length > 3 %}{{ '\n' }}{% endif %}{% for", 1)
    spec = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())
    base = write_base(tmp_path / "base", spec, {"eos_token": EOS, "pad_token": PAD, "chat_template": other})
    with pytest.raises(UserError, match="nothing is exported: a conversation of stream `chat` would be served as"):
        export(checkpoint_of(shards, tmp_path, {"pretrained": str(base)}), tmp_path / "out")
