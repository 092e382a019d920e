"""A `transformers` causal language model as a ComposerModel, with the loss this project defines.

The loss of a batch is the mean over its trained tokens, wherever microbatches and ranks cut it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from chimera.cli import UserError, one_line
from train.collate import IGNORED, trained_tokens
from train.settings import TrainSettings

VOCAB_MULTIPLE = 128  # matrix units want it


class CausalLM(ComposerModel):
    """`transformers` model whose batches are `{input_ids, labels, position_ids}`, each `[sequences, seq_len]`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits `[sequences, seq_len, vocabulary]`."""
        # With a cache, transformers 4.53 drops the document mask it derives from position_ids without a word.
        return self.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Mean cross-entropy in nats over the trained tokens of `batch`, a scalar; 0 where there are none."""
        trained = (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)  # stays on the device: no sync
        return token_losses(outputs, batch["labels"]).sum() / trained

    def eval_forward(self, batch: dict[str, Tensor], outputs: Tensor | None = None) -> Tensor:
        return self.forward(batch) if outputs is None else outputs

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        return {} if is_train else {"loss": TokenLoss(), "perplexity": Perplexity()}

    def update_metric(self, batch: dict[str, Tensor], outputs: Tensor, metric: Metric) -> None:
        metric.update(outputs, batch["labels"])


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each prediction, `[sequences * seq_len] float32`; 0 where nothing is trained."""
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")


class TokenLoss(Metric):
    """Mean cross-entropy in nats over all trained tokens of all batches and ranks."""

    full_state_update = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.tensor(0, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.total += token_losses(logits, labels).sum(dtype=torch.float64)
        self.tokens += trained_tokens(labels)

    def compute(self) -> Tensor:
        return (self.total / self.tokens.clamp(min=1)).float()


class Perplexity(TokenLoss):
    """exp of the mean cross-entropy."""

    def compute(self) -> Tensor:
        return super().compute().exp()


def build_model(settings: TrainSettings, vocab_size: int, eos_id: int, pad_id: int) -> CausalLM:
    """The model `settings.model` describes, its vocabulary padded to a multiple of 128.

    Args:
        vocab_size: ids the shards' tokenizer can produce (largest id + 1).

    Raises:
        UserError: the model type or a key is unknown, or a given vocabulary is too small.
    """
    padded = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    options = dict(settings.model)
    pretrained = options.pop("pretrained", None)
    attention = settings.attn_implementation
    if attention in ("flex_attention", "flash_attention_2") and not torch.cuda.is_available():
        raise UserError(f"setting `attn_implementation: {attention}` needs a GPU, and none is found: take sdpa")
    if int(options.get("vocab_size", padded)) < vocab_size:
        raise UserError(
            f"setting `model.vocab_size` is {options['vocab_size']}, but the shards' tokenizer makes ids up to "
            f"{vocab_size - 1}: leave it out (it becomes {padded}) or set it to at least {vocab_size}"
        )
    try:
        if pretrained:
            model = AutoModelForCausalLM.from_pretrained(
                pretrained,
                local_files_only=True,
                torch_dtype=torch.float32,
                attn_implementation=attention,
                **options,
            )
            if model.get_input_embeddings().num_embeddings < vocab_size:
                model.resize_token_embeddings(padded, mean_resizing=False)
        else:
            model_type = options.pop("model_type", None)
            if model_type is None:
                raise UserError("setting `model` needs `model_type` (llama, ...) or `pretrained: FOLDER`")
            options.setdefault("vocab_size", padded)
            known = set(AutoConfig.for_model(model_type).to_dict())
            for key in options:
                if key not in known:
                    raise UserError(f"setting `model.{key}` is unknown to transformers' {model_type} configuration")
            config = AutoConfig.for_model(
                model_type,
                **{
                    "bos_token_id": None,
                    "eos_token_id": eos_id,
                    "pad_token_id": pad_id if pad_id >= 0 else None,
                    **options,
                },
            )
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except (ValueError, OSError, KeyError, ImportError, TypeError) as error:
        raise UserError(f"setting `model`: {one_line(error)[:300]}") from None
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.liger:
        _apply_liger(model)
    return CausalLM(model)


def _apply_liger(model: PreTrainedModel) -> None:
    """Swap norm, rotary and MLP kernels for Liger's; the loss stays ours."""
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
    except ImportError:
        raise UserError("setting `liger` needs the gpu extra: pip install -e '.[gpu]'") from None
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def check_tokens(manifest_streams: dict[str, Any], used: Sequence[str], vocabulary: int) -> None:
    """Raise `UserError` if a stream holds an id the model has no embedding for (the manifest knows the largest)."""
    for name in used:
        largest = manifest_streams.get(name, {}).get("max_token_id")
        if largest is not None and largest >= vocabulary:
            raise UserError(
                f"stream `{name}` holds token id {largest}, but the model's vocabulary has {vocabulary} entries: "
                "set `model.vocab_size` higher, or build the shards with the model's tokenizer"
            )
