"""What must hold of a model, its vocabulary and its distribution before the first step."""

import dataclasses
import os
from typing import Any

import torch
from composer.utils import FSDPConfig
from torch import Tensor

from chimera.cli import UserError
from chimera.train.settings import TrainSettings
from chimera.train.step.model import CausalLM


def check_causal(model: CausalLM, seq_len: int) -> None:
    """Raise `UserError` unless the tokens that follow one leave its logits as they are.

    `transformers` also makes causal models of those that see both ways, and only warns. Two forward passes of
    sequences differ in their second halves alone; the first ones' logits must not.
    """
    half = max(1, seq_len // 2)
    places = torch.arange(seq_len)
    ids = places.remainder(7)
    passes = logits_alone(model, places, ids, torch.where(places < half, ids, ids + 7))
    one, two = (logits[:half].float() for logits in passes)
    # This check cannot be turned off, so it leaves room for the rounding of kernels of half precision.
    share = 1e-4 if passes[0].dtype == torch.float32 else 1e-2
    if (off := (one - two).abs().max().item()) > share * one.abs().max().item():
        raise UserError(
            f"setting `model`: a `{model.model.config.model_type}` model sees the tokens that follow the one it is at "
            f"(they change its logits by {off:.2g}): take a causal model (llama, qwen2, gpt2, ...); one like BERT is "
            "causal with `is_decoder: true`"
        )


def logits_alone(model: CausalLM, places: Tensor, *sequences: Tensor) -> list[Tensor]:
    """Of each of `sequences`, its logits `[seq_len, vocabulary]`, without dropout: nothing random is drawn."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad():
        # not model(...), which `torch.compile` would make graphs of for this shape alone
        batches = [
            {"input_ids": x.expand(2, -1).to(device), "position_ids": places.expand(2, -1).to(device)}
            for x in sequences
        ]
        found = [model.logits(batch)[0] for batch in batches]
    model.train(training)
    return found


def check_document_mask(model: CausalLM, seq_len: int) -> None:
    """Raise `UserError` unless what a document says leaves the documents after it in its sequence as they are.

    Not every `transformers` model makes a document mask of `position_ids`, and those that do not say nothing. Two
    forward passes of two sequences differ in their first documents alone; the second ones' logits must not.
    """
    half = seq_len // 2
    places = torch.cat([torch.arange(half), torch.arange(seq_len - half)])
    ids = torch.arange(seq_len).remainder(7)
    other = torch.where(torch.arange(seq_len) < half, ids + 7, ids)
    one, two = (logits[half:].float() for logits in logits_alone(model, places, ids, other))
    # The same numbers but for kernels whose order of summation is not fixed; what leaks is far above that.
    if (off := (one - two).abs().max().item()) > 1e-4 * one.abs().max().item():
        config = model.model.config
        raise UserError(
            f"setting `document_mask: true` has no effect on `{config.model_type}` with `attn_implementation: "
            f"{config._attn_implementation}`: other text before a document changes its logits by {off:.2g}: set "
            "`document_mask=false`, or take a model that tells documents apart (llama, qwen2, mistral, ...)"
        )


def check_parallelism(parallelism: dict[str, Any]) -> None:
    """Raise `UserError` for a key Composer would pass over in silence, and for what cannot be resumed or run here."""
    if not parallelism:
        return
    known = {field.name for field in dataclasses.fields(FSDPConfig) if field.init and not field.name.startswith("_")}
    if set(parallelism) != {"fsdp"} or not isinstance(parallelism["fsdp"] or {}, dict):
        raise UserError(f"setting `parallelism` has {', '.join(parallelism)}; it takes `fsdp: {{...}}` alone")
    options = parallelism["fsdp"] or {}
    for key in options:
        if key not in known:
            raise UserError(f"setting `parallelism.fsdp.{key}` is unknown; known are {', '.join(sorted(known))}")
    if options.get("state_dict_type", "full") != "full":
        raise UserError("setting `parallelism.fsdp.state_dict_type`: checkpoints are one file, so it must be full")
    if os.environ.get("FSDP_VERSION", "1") != "1":
        raise UserError("FSDP_VERSION is set in the environment: its second version writes other checkpoints: unset it")


def check_device(settings: TrainSettings, on_gpu: bool) -> None:
    """Raise `UserError` for settings that need a GPU where there is none."""
    if on_gpu:
        return
    if settings.parallelism:
        raise UserError("setting `parallelism` needs GPUs, and none is found: leave it out")
    if settings.precision not in ("auto", "fp32"):
        raise UserError(f"setting `precision: {settings.precision}` needs a GPU, and none is found: take auto or fp32")
