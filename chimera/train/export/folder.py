"""A checkpoint → a Hugging Face folder, written beside its place and moved there once it is proven."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from chimera.cli import UserError
from chimera.files import is_at, try_lock
from chimera.text import markdown, one_line
from chimera.train.data.state import check_weights
from chimera.train.export.card import card
from chimera.train.export.differences import differences
from chimera.train.export.proof import check_texts, prove
from chimera.train.export.tokenizer import CONFIG, GENERATION, of_no_class, spoken
from chimera.train.export.trained import trained_template
from chimera.train.run.checkpoint_file import read_checkpoint
from chimera.train.step import rotary
from chimera.train.step.base import check_files
from chimera.train.step.configuration import positions
from chimera.versions import dtype_keyword, with_both_names

# Of a model's configuration: its type in training (transformers 4 would keep the name it does not know), and code.
LEFT_OUT = ("dtype", "torch_dtype", "auto_map", "_attn_implementation", "attn_implementation", "quantization_config")
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
    if about.get("base"):
        check_files(about["base"]["files"], f"{checkpoint}: what it holds of its base")
    seen = state["dataset_state"]["train"]
    trained = trained_template(about, [name for name, blocks in seen["consumed"].items() if blocks], template)
    with folder_for(out) as folder:
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
        save(model, folder, shard)
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


@contextmanager
def folder_for(out: Path) -> Iterator[Path]:
    """An empty folder beside `out`, which takes its place at the end of the `with`; after an error neither is there.

    Raises `UserError` where another export writes `out`. What a killed one has left is removed.
    """
    folder = out.with_name(f".{out.name}.export")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, FileNotFoundError) as error:
        raise UserError(f"no folder can be made at {error.filename}: {error.strerror}: give another place") from None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _locked(folder, descriptor) or not is_at(folder, descriptor):
            raise UserError(f"{out} is being written by another export: let it end, or give a new folder")
        try:
            empty(folder)
            yield folder
            folder.rename(out)  # which may be an empty one: the command has looked
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise UserError(f"{out} was written by something else meanwhile: give a new folder") from None
            raise
    finally:
        os.close(descriptor)


def _locked(folder: Path, descriptor: int) -> bool:
    """Whether no other export writes in a folder; taken for granted on a file system without locks."""
    try:
        return try_lock(descriptor, folder)
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise
        return True


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def save(model: Any, folder: Path, shard: str) -> None:
    """Write the weights and the configuration of a model."""
    try:
        model.save_pretrained(folder, max_shard_size=shard)
    except SafetensorError as error:  # a full disk, above all
        raise UserError(
            f"the weights cannot be written in {folder.parent}: {one_line(error)[:200]}: make room or go elsewhere"
        ) from None


def build(about: Mapping[str, Any], weights: dict[str, Any], dtype: Any, step: int) -> Any:
    """The `transformers` model with the checkpoint's weights in `dtype`.

    Made in `dtype` and not cast to it: that would cast the rotary frequencies too, which `transformers` keeps float32.
    """
    options = with_both_names(json.loads(about["model_config"]))
    for name in LEFT_OUT:
        options.pop(name, None)
    layers = options.get("num_hidden_layers")
    with _as_described():
        if isinstance(layers, int) and layers > len(weights):
            raise ValueError(f"{layers} layers, and {len(weights)} weights")
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        for name, shape in shapes_of(config).items():
            if (there := weights.get(f"model.{name}")) is not None and there.shape != shape:
                raise ValueError(f"{name} is {list(shape)}, and {list(there.shape)} in the checkpoint")
        model = AutoModelForCausalLM.from_config(config, **{dtype_keyword(): dtype})
    check_weights(weights, {f"model.{name}" for name in model.state_dict()}, json.loads(about["model_config"]), step)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return model.eval()


def shapes_of(config: Any) -> dict[str, Any]:
    """The shapes of a model's weights, for which no memory is taken; none for a type that cannot be made so."""
    try:
        with torch.device("meta"):
            made = AutoModelForCausalLM.from_config(deepcopy(config))
    except Exception:
        return {}
    return {name: tensor.shape for name, tensor in made.state_dict().items()}


@contextmanager
def _as_described() -> Iterator[None]:
    """Make one line of whatever a description that does not fit the weights raises in `transformers`."""
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(
            f"the checkpoint's description of its model does not fit its weights: {one_line(cause)[:300]}"
        ) from None


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
