"""Checkpoints for tests of exports, and model folders that they go on from, with tokenizers made on the spot."""

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from chimera.manifest import Stream
from chimera.train.data.shards import Shards, ShardsTokenizer
from chimera.train.data.state import make_state
from chimera.train.order.schedule import Phase, Stage, build_plan
from chimera.train.run.callbacks import About
from chimera.train.settings import TrainSettings
from chimera.train.step.base import base_files
from chimera.train.step.model import build_model
from tests.convert.small_tokenizer import spec

SIZES = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
HEADERS = "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + eos_token }}{% endfor %}"
HEADERS += "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"


def with_special(*tokens: str, bos: str | None = None) -> dict[str, Any]:
    """A tokenizer.json with more special tokens, of which `bos` is put before a text by the post-processor."""
    found = json.loads(spec())
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    first = max(token["id"] for token in found["added_tokens"]) + 1
    first = max(first, max(found["model"]["vocab"].values()) + 1)
    for number, token in enumerate([*tokens, *([bos] if bos else [])]):
        found["added_tokens"].append({"id": first + number, "content": token, "special": True, **plain})
    if bos:
        added = {"id": bos, "ids": [first + len(tokens)], "tokens": [bos]}
        parts = [{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        pair = [*parts, {"Sequence": {"id": "B", "type_id": 1}}]
        processor = {"type": "TemplateProcessing", "single": parts, "pair": pair, "special_tokens": {bos: added}}
        found["post_processor"] = processor
    return found


def write_base(folder: Path, tokenizer: dict[str, Any], config: dict[str, Any], **model: Any) -> Path:
    """A model folder: random weights, `tokenizer` as tokenizer.json, `config` as tokenizer_config.json."""
    settings = TrainSettings(model={**SIZES, **model})
    torch.manual_seed(1)
    made = build_model(settings, vocab_size=700 + len(tokenizer["added_tokens"]), eos_id=0, pad_id=1).model
    made.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False))
    return folder


def write_checkpoint(
    folder: Path,
    tokenizer: dict[str, Any],
    model: dict[str, Any],
    formats: dict[str, str],
    eos: str = "<|endoftext|>",
    pad: str = "<|padding|>",
    seq_len: int = 32,
    samples: list[list[int]] | None = None,
) -> Path:
    """The checkpoint of a run of two steps, each of one block of 64 tokens of each stream in `formats`."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "shards-tokenizer.json"
    file.write_text(json.dumps(tokenizer, ensure_ascii=False))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    size = max(*tokenizer["model"]["vocab"].values(), *ids.values()) + 1
    opened = ShardsTokenizer(file, "", size, ids[eos], ids[pad], eos, pad)
    stream = Stream.from_index("", 1, 2, 64, "a test")
    streams = {name: stream.model_copy(update={"format": kind}) for name, kind in formats.items()}
    shards = Shards("/nowhere", "", opened, 64, streams)
    return checkpoint_of(shards, folder, model, seq_len, samples)


def checkpoint_of(
    shards: Shards,
    folder: Path,
    model: dict[str, Any],
    seq_len: int = 32,
    samples: list[list[int]] | None = None,
) -> Path:
    """The checkpoint of a run of two steps, each of one block of 64 tokens of each stream of `shards`."""
    settings = TrainSettings(run_name="small", model=model)
    torch.manual_seed(2)
    built = build_model(settings, shards.tokenizer.vocab_size, shards.tokenizer.eos_id, shards.tokenizer.pad_id)
    about = About(built, shards, settings, "fp32", 2)
    about.about["samples"] += samples or []
    shares = {name: Fraction(1, len(shards.streams)) for name in shards.streams}
    phases = [Phase("only", 2, shares, 64 * len(shards.streams) // seq_len)]
    plan = build_plan(phases, [Stage(0, seq_len)], "sequences", 64)
    state = {
        "model": built.state_dict(),
        "callbacks": {"About": about.state_dict()},
        "dataset_state": {"train": make_state(plan, 17, dict.fromkeys(shards.streams, ""), 2)},
    }
    torch.save({"state": state}, folder / "checkpoint.pt")
    return folder / "checkpoint.pt"


def check_card(base: Path, out: Path) -> list[str]:
    """Assert that an export's card names whatever differs from its base's files; returns the run's changes on it."""
    text = (out / "README.md").read_text()
    changes, _, files = text.partition("\nOf its files these say more than the base's, or something else:\n")
    told = {line.split("`")[1]: line for line in files.splitlines() if line.startswith("- ")}
    kept = base_files(str(base))
    made = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    made = {name: data for name, data in made.items() if "safetensors" not in name and name != "README.md"}
    differing = {name for name in kept.keys() | made.keys() if kept.get(name) != made.get(name)}
    assert told.keys() <= differing
    for name in differing:
        pair = [kept.get(name), made.get(name)]
        was, now = (json.loads(data) if data and name.endswith(".json") else None for data in pair)
        if was is None or now is None:
            assert name in told, name
            continue
        keys = {key for key in was.keys() | now.keys() if key not in was or key not in now or was[key] != now[key]}
        assert all(f"`{key}`" in told[name] for key in keys), (name, keys, told.get(name))
        assert keys or name not in told, name
    return [line.removeprefix("- ") for line in changes.splitlines() if line.startswith("- ")]
