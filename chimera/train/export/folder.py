"""A checkpoint → a Hugging Face folder, written beside its place and moved there once it is proven."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chimera.cli import UserError
from chimera.text import markdown
from chimera.train.data.state import check_weights
from chimera.train.export.card import card
from chimera.train.export.differences import differences
from chimera.train.export.proof import check_texts, prove
from chimera.train.export.tokenizer import CONFIG, GENERATION, of_no_class, spoken
from chimera.train.export.trained import trained_template
from chimera.train.run.checkpoint_file import read_checkpoint
from chimera.train.step import rotary
from chimera.train.step.configuration import positions
from chimera.versions import dtype_keyword, with_both_names

SHARD = "5GB"  # of weights in one file, at most; transformers 5 would write 50 GB


def export(checkpoint: Path, out: Path, dtype: str = "auto", shard: str = SHARD, template: str | None = None) -> None:
    """Write `out` from `checkpoint`; where the copy differs from what was trained, raise `UserError` and write nothing.

    Args:
        dtype: of the weights; auto: the base's, without one bfloat16 where they were trained in it, else float32.
        shard: bytes of weights in one file, at most.
        template: the stream whose chat template it speaks, where the chats trained on have several.
    """
    state = read_checkpoint(checkpoint)
    about = state["callbacks"]["About"]["about"]
    seen = state["dataset_state"]["train"]
    trained = trained_template(about, [name for name, blocks in seen["consumed"].items() if blocks], template)
    model = build(about, state["model"], getattr(torch, type_of(about, dtype)), int(seen["step"]))
    if "rotary" in about and not rotary.same_frequencies(about["rotary"], rotary.frequencies(model)):
        raise UserError(
            f"{checkpoint}: this version of transformers makes other rotary frequencies of its configuration than "
            "it was trained with: export it with the version it was saved with"
        )
    changes = settle_context(model.config, longest_trained(seen))
    if about.get("bos") and not about.get("base"):
        model.config.bos_token_id = about["bos"][0]
    changes += [] if dtype == "auto" else [f"the type of the weights: {dtype}, as was asked for"]
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        model.save_pretrained(folder, max_shard_size=shard)
        write_json(folder / "config.json", with_both_names(json.loads((folder / "config.json").read_bytes())))
        written = folder / GENERATION
        known = written.read_bytes() if written.exists() else None
        words = spoken(about, trained, known, positions(model.config), longest_trained(seen))
        for name, data in words.files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)
        changes = [*words.changes, *settle_class(folder, about), *changes]
        tokenizer = prove(model, folder, about, trained, longest_trained(seen))
        differing = differences(about["base"]["files"], folder) if about.get("base") else []
        said = card(about, state, trained, changes, differing, tokenizer)
        (folder / "README.md").write_text(said, encoding="utf-8")
        readable(folder)
        if out.exists():
            out.rmdir()  # an empty one: the command has looked
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def build(about: Mapping[str, Any], weights: dict[str, Any], dtype: Any, step: int) -> Any:
    """The `transformers` model with the checkpoint's weights in `dtype`.

    Made in `dtype` and not cast to it: that would cast the rotary frequencies too, which `transformers` keeps float32.
    """
    options = with_both_names(json.loads(about["model_config"]))
    for name in ("dtype", "torch_dtype"):  # of training; transformers 4 would keep the one it does not know
        options.pop(name, None)
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config, **{dtype_keyword(): dtype})
    check_weights(weights, {f"model.{name}" for name in model.state_dict()}, json.loads(about["model_config"]), step)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return model.eval()


def type_of(about: Mapping[str, Any], dtype: str) -> str:
    """The name of the weights' type that `dtype` stands for."""
    if dtype != "auto":
        return dtype
    if base := about.get("base"):
        config = json.loads(base["files"].get("config.json", b"{}"))
        kept = config.get("dtype") or config.get("torch_dtype")
        return kept if kept in ("float32", "bfloat16", "float16") else "float32"
    return "bfloat16" if about.get("precision") == "amp_bf16" else "float32"


def longest_trained(seen: Mapping[str, Any]) -> int:
    """Tokens of the longest sequences in the steps so far, 0 before the first."""
    return max((run["seq_len"] for run in seen["settings"]["history"]), default=0)


def settle_context(config: Any, longest: int) -> list[str]:
    """Have the configuration name no shorter context than was trained; returns what changed, in words."""
    bound = positions(config)
    if bound is None or longest <= bound:
        return []
    config.max_position_embeddings = longest
    return [f"the context length: {longest} tokens, as was trained; the configuration named {bound}"]


def settle_class(folder: Path, about: Mapping[str, Any]) -> list[str]:
    """Have `tokenizer.json` read as it is where the class that a base names makes other ids; returns what changed.

    Some classes of transformers 5 build their tokenizer anew from the vocabulary. Llama's leaves the space out that a
    normalizer prepends: transformers 4, which reads the file, names no such class either.
    """
    path = folder / CONFIG
    config = json.loads(path.read_bytes()) if path.exists() else {}
    named = config.get("tokenizer_class")
    if not about.get("base") or named == "PreTrainedTokenizerFast":
        return []
    llama = named in (None, "LlamaTokenizer", "LlamaTokenizerFast")
    llama = llama and json.loads(about["model_config"]).get("model_type") == "llama"
    if not llama or "Prepend" not in str(json.loads((folder / "tokenizer.json").read_bytes())["normalizer"]):
        try:
            check_texts(AutoTokenizer.from_pretrained(folder, local_files_only=True), about)
            return []
        except UserError:
            pass
        except Exception:  # of a file that this version cannot read: `prove` says which
            return []
    write_json(path, of_no_class(config))
    was = markdown(named or "not named")
    return [f"tokenizer_config.json: its class was {was}, which gives other ids than were trained"]


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def readable(folder: Path) -> None:
    """Give a folder and what is in it the modes that the umask gives: weights and temporary folders come as 0600."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
