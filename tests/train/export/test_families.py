"""A base of each family, with its tokenizer's conventions: shards, two steps of training, export and its user."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from chimera.commands import export_hf
from chimera.commands.train import main as train
from tests.convert import builds
from tests.train.conftest import steps_of, weights_of
from tests.train.export.families import CHATS, FAMILIES, TEXTS, Family
from tests.train.exports import check_card

KNOWN = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(family.model["model_type"] not in CONFIG_MAPPING_NAMES, reason="not in transformers"),
    )
    for name, family in FAMILIES.items()
]
USER, SYSTEM = {"role": "user", "content": "Ciao?"}, {"role": "system", "content": "Sii breve."}


def build(family: Family, base: Path, folder: Path) -> dict[str, list[list[int]]]:
    """Shards of the base's tokenizer; the ids of each stream's documents, without the EOS that ends them."""
    streams: dict[str, Any] = {}
    for name, rows in {"web": [{"text": text} for text in TEXTS], **({"chat": CHATS} if family.chats else {})}.items():
        (folder / f"{name}.jsonl").write_bytes(builds.jsonl(rows))
        form = "chatml" if name == "chat" else "text"
        streams[name] = {"format": form, "packing": "concat", "sources": [{"files": [f"{folder}/{name}.jsonl"]}]}
    tokenizer = {"path": str(base), "eos_token": family.eos, "pad_token": family.pad}
    tokenizer |= {"bos": family.put, "add_tokens": list(family.add)}
    shards: dict[str, Any] = {"output": f"{folder}/shards", "tokenizer": tokenizer, "block_len": 64, "eval_fraction": 0}
    manifest = builds.build_here({**shards, "streams": streams, "compression": None})
    eos, pad = (manifest["tokenizer"][key] for key in ("eos_id", "pad_id"))
    return {name: documents(folder / "shards" / name / "train", eos, pad) for name in streams}


def documents(split: Path, eos: int, pad: int | None) -> list[list[int]]:
    ids: list[int] = []
    for entry in json.loads((split / "index.json").read_bytes())["shards"]:
        data = (split / entry["raw_data"]["basename"]).read_bytes()
        records = np.frombuffer(data, np.uint8, offset=int(np.frombuffer(data, "<u4", 2)[1]))
        ids += records.reshape(entry["samples"], -1)[:, -128:].copy().view("<u2").reshape(-1).tolist()
    ends = [-1, *(i for i, id_ in enumerate(ids) if id_ == eos)]
    found = [[id_ for id_ in ids[a + 1 : b] if id_ != pad] for a, b in pairwise(ends)]
    return [document for document in found if document]


def chat_ids(tokenizer: Any, chat: list[dict[str, str]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, **options))


def json_of(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", KNOWN)
def test_a_base_of_a_family_comes_back_as_its_own(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    base, out, run = family.write(tmp_path / "base"), tmp_path / "out", tmp_path / "run"
    stored = build(family, base, tmp_path)
    settings = {
        "shards": f"{tmp_path}/shards",
        "save_folder": str(run),
        "global_train_batch_size": 4,
        "phases": [{"name": "all", "steps": 2, "proportions": {stream: 1 / len(stored) for stream in stored}}],
        "curriculum": {"stages": [{"from_step": 0, "seq_len": 64}]},
        "model": {"pretrained": str(base)},
        "optimizer": {"lr": 0.01},
        "scheduler": {"name": "constant"},
        "eval": {"interval": 0},
        "generate": {"interval": 0},
        "document_mask": name != "gpt2",  # transformers 4 has none for it
        "max_passes": 1000,
    }
    (tmp_path / "train.yaml").write_text(json.dumps(settings))
    assert train([str(tmp_path / "train.yaml"), f"cache={tmp_path}/cache"]) == 0
    assert [step["step"] for step in steps_of(run)] == [0, 1]
    assert export_hf.main([str(run / "latest-rank0.pt"), str(out)]) == 0

    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out, torch_dtype="auto")
    check_texts(family, tokenizer, stored["web"])
    check_template(family, tokenizer)
    if family.chats:
        check_chats(tokenizer, stored["chat"])
    check_files(family, base, out)
    check_model(model, base, out, weights_of(run, 2))
    ends = {*family.ends, family.eos, *(["<|im_end|>"] if family.chats else [])}
    for end in tokenizer.convert_tokens_to_ids(sorted(ends)):
        asked = tokenizer("Ciao", return_tensors="pt")
        made = model.generate(**asked, sequence_bias=[[[end], 1e9]], do_sample=False, max_new_tokens=3)
        assert made[0, asked["input_ids"].shape[1] :].tolist() == [end]


def check_texts(family: Family, tokenizer: Any, stored: list[list[int]]) -> None:
    """A user's ids of a text are the stored ones, behind the BOS where the shards were asked to have none."""
    assert len(stored) == len(TEXTS)
    bos = [tokenizer.convert_tokens_to_ids(family.bos)] if family.bos else []
    for text, ids in zip(TEXTS, stored, strict=True):
        assert tokenizer(text).input_ids == (bos if family.put == "never" else []) + ids, text
        assert ids[: len(bos)] == bos or family.put == "never"


def check_template(family: Family, tokenizer: Any) -> None:
    """A model is asked as its family is; a control token is one id, and BOS stands where the template writes it."""
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True}
    asked = tokenizer.apply_chat_template([USER], **options)
    assert asked.lstrip("\n") == family.asked
    if family.system is None:
        with pytest.raises(Exception, match="roles must alternate"):
            tokenizer.apply_chat_template([SYSTEM, USER], **options)
    else:
        assert tokenizer.apply_chat_template([SYSTEM, USER], **options) == family.system
    ids = chat_ids(tokenizer, [USER], add_generation_prompt=True)
    controls = [token for token in (*family.tokens, *family.plain, *family.add) if token in asked]
    for token in controls:
        assert ids.count(tokenizer.convert_tokens_to_ids(token)) == asked.count(token), token


def check_chats(tokenizer: Any, stored: list[list[int]]) -> None:
    """What was trained on begins as a model is asked, and ends with the turn."""
    assert len(stored) == len(CHATS)
    for row, ids in zip(CHATS, stored, strict=True):
        asked = chat_ids(tokenizer, row["messages"][:1], add_generation_prompt=True)
        answer = tokenizer(row["messages"][1]["content"], add_special_tokens=False).input_ids
        assert ids == [*asked, *answer, tokenizer.convert_tokens_to_ids("<|im_end|>")]


def check_files(family: Family, base: Path, out: Path) -> None:
    """Files are the base's, byte by byte, but for those of which the card tells a change."""
    card = (out / "README.md").read_text()
    told = check_card(base, out)
    assert len(told) == len(family.changes), told
    assert all(line.startswith(change) for line, change in zip(told, family.changes, strict=True)), told
    changed = {change.partition(":")[0] for change in family.changes}
    if "the vocabulary" in changed:
        changed |= {"tokenizer.json"}
    if "the chat template" in changed:
        changed |= {"tokenizer_config.json"}
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja") and file.name not in {"config.json", *changed}:
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    puts = f"Its tokenizer puts `{family.bos}` around a text; the texts it went on with had none."
    assert (puts in card) == ("tokenizer puts" in card) == (family.put == "never")


def check_model(model: Any, base: Path, out: Path, weights: dict[str, Any]) -> None:
    """Its weights are the checkpoint's, its numbers the base's, and both agree."""
    config, kept = json_of(out / "config.json"), json_of(base / "config.json")
    rows = model.get_input_embeddings().num_embeddings
    grown = {"vocab_size"} if rows != kept["vocab_size"] else set()
    for key in kept.keys() - {"transformers_version", *grown}:
        assert config[key] == kept[key], key
    assert config["vocab_size"] == rows == model.get_output_embeddings().out_features
    before = AutoModelForCausalLM.from_pretrained(base, torch_dtype="auto").state_dict()
    moved = 0
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[f"model.{name}"].to(tensor.dtype)), name
        assert tensor.dtype == before[name].dtype
        moved += not torch.equal(tensor, before[name])
    assert moved
    with torch.no_grad():
        logits = model(torch.arange(100)[None]).logits
    assert logits.shape == (1, 100, config["vocab_size"])
    assert logits.isfinite().all()
