"""Checkpoint → Hugging Face folder: `python train/export_hf.py CHECKPOINT OUT`.

Writes the model, its tokenizer with a ChatML chat template, a generation config and a model card with the mix the
weights have really seen. Then it loads the folder as a user would and compares logits.
"""

import argparse
import json
import pickle
import sys
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.chatml import CHAT_TEMPLATE, IM_END
from chimera.cli import UserError, counted, one_line, run, say
from chimera.stack import check_stack
from chimera.stores import is_remote


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="export_hf.py", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="ep…-ba…-rank0.pt or latest-rank0.pt, a file or the URI of one")
    parser.add_argument("out", type=Path, help="folder to write; must not exist or be empty")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args(argv)
    check_stack()
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out} is not empty: give a new folder")
    if not is_remote(args.checkpoint):
        export(Path(args.checkpoint), args.out, args.dtype)
    else:
        from train.run_store import fetch

        with tempfile.TemporaryDirectory(prefix="chimera-export-") as folder:
            fetch(args.checkpoint, fetched := Path(folder, "checkpoint.pt"))
            export(fetched, args.out, args.dtype)
    say(f"{args.out}: model, tokenizer and card written; it loads, and its logits are the checkpoint's")
    return 0


def export(checkpoint: Path, out: Path, dtype: str = "float32") -> None:
    """Write `out` from `checkpoint`; raises `UserError` where the checkpoint cannot be read or the copy differs."""
    import torch

    state = read_checkpoint(checkpoint)
    about = state["callbacks"]["About"]["about"]
    model = build(about, state["model"], getattr(torch, dtype))
    model.save_pretrained(out)
    tokenizer = save_tokenizer(about, out)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(IM_END)]
    generation = {
        "bos_token_id": None,
        "eos_token_id": sorted({end for end in ends if end is not None}),
        "pad_token_id": tokenizer.pad_token_id,
        "max_new_tokens": 256,
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (out / "README.md").write_text(card(about, state), encoding="utf-8")
    check(model, out)


def read_checkpoint(path: Path, lazy: bool = False) -> dict[str, Any]:
    """The `state` of one of our checkpoints, on the CPU; only tensors and plain values are unpickled.

    `lazy`: a tensor's bytes are read where they are used, so the file must stay as it is until then.
    """
    import numpy
    import torch
    from numpy._core.multiarray import _reconstruct  # type: ignore[attr-defined]  # private: not in its stubs
    from torch.torch_version import TorchVersion

    # What Composer keeps beside the tensors: random states, durations, torch's version.
    plain = [_reconstruct, numpy.ndarray, numpy.dtype, numpy.dtypes.UInt32DType, timedelta, TorchVersion]
    try:
        with torch.serialization.safe_globals(plain):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)["state"]
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except (RuntimeError, OSError, ValueError, KeyError, EOFError, TypeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is not a checkpoint that can be read: {one_line(error)[:200] or type(error).__name__}"
        ) from None
    callbacks = dict(state.get("callbacks") or {}) if isinstance(state, dict) else {}
    if "About" not in callbacks:
        raise UserError(f"{path} was not written by train/main.py: it lacks the model's description")
    return {**state, "callbacks": callbacks}


def build(about: dict[str, Any], weights: dict[str, Any], dtype: Any) -> Any:
    """The `transformers` model with the checkpoint's weights in `dtype`.

    Made in `dtype` and not cast to it: that would cast the rotary frequencies too, which `transformers` keeps float32.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    options = json.loads(about["model_config"])
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    model = AutoModelForCausalLM.from_config(config, torch_dtype=dtype)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in weights.items()})
    return model.eval()


def save_tokenizer(about: dict[str, Any], out: Path) -> Any:
    """The shards' tokenizer as a `transformers` one, written to `out`."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(about["tokenizer"]),
        eos_token=about["eos_token"],
        pad_token=about["pad_token"],
        model_input_names=["input_ids", "attention_mask"],  # else also token_type_ids, which `generate` refuses
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(out)
    return tokenizer


def card(about: dict[str, Any], state: dict[str, Any]) -> str:
    """A model card with what the weights have seen, from the checkpoint's own counts."""
    consumed = state["dataset_state"]["train"]["consumed"]
    tokens = {name: blocks * about["block_len"] for name, blocks in consumed.items()}
    total = sum(tokens.values())
    rows = [
        f"| {name} | {count:,} | {count / max(1, total):.2%} | {source_of(about['sources'].get(name))} |"
        for name, count in tokens.items()
    ]
    step = state["dataset_state"]["train"]["step"]
    return "\n".join(
        [
            f"# {about['run_name']}",
            "",
            f"A causal language model after {step:,} steps on {total:,} tokens, trained with Chimera.",
            "",
            "| stream | tokens seen | share | source |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "The tokenizer's chat template is ChatML; documents end with "
            f"`{about['eos_token']}`, turns with `{IM_END}`.",
            "",
        ]
    )


def source_of(source: Any) -> str:
    """A stream's source as the manifest describes it, in a few words and without the names of our folders."""
    described = source.get("describe", "") if isinstance(source, dict) else ""
    if not isinstance(described, dict):  # shards made by others: their folder
        return one_line(str(described)).replace("|", "/")
    if files := [Path(file["path"]).name for file in described.get("files", [])]:
        words = f"{counted(len(files), 'local file')}: {', '.join(files[:3])}"
        return one_line(words + (", …" if len(files) > 3 else "")).replace("|", "/")
    which = [described.get(key) for key in ("subset", "data_dir", "split")]
    revision = str(described.get("revision"))[:12]
    return one_line(f"{described.get('hub')} ({', '.join(filter(None, which))}) at {revision}").replace("|", "/")


def check(model: Any, out: Path) -> None:
    """Raise `UserError` unless the folder loads and its logits on fixed ids equal `model`'s."""
    import torch
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(out, torch_dtype=model.dtype, local_files_only=True).eval()
    positions = getattr(model.config, "max_position_embeddings", 64)
    ids = torch.arange(min(64, model.config.vocab_size, positions))[None]
    with torch.no_grad():
        if not torch.equal(model(ids).logits, again(ids).logits):
            raise UserError(f"{out} loads, but its logits differ from the checkpoint's")


def entry() -> None:
    run(main)


if __name__ == "__main__":
    entry()
