"""A `transformers` causal language model as a ComposerModel, with the loss this project defines.

The loss of a batch is the mean over its trained tokens, wherever microbatches and ranks cut it.
"""

from typing import Any

import torch
import torch.nn.functional as F
from composer.models import ComposerModel
from torch import Tensor
from torchmetrics import Metric
from transformers import AutoModelForCausalLM, PreTrainedModel

from chimera.cli import UserError
from chimera.text import one_line
from chimera.train.settings import TrainSettings
from chimera.train.step.collate import IGNORED, trained_tokens
from chimera.train.step.configuration import configuration, padded, sizes_of_transformers
from chimera.versions import cast_before_flex_attention, dtype_keyword, install


class CausalLM(ComposerModel):
    """`transformers` model whose batches are `{input_ids, labels, position_ids}`, each `[sequences, seq_len]`."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.size = sum(p.numel() for p in model.parameters())  # of the whole, before FSDP cuts it
        # transformers 4.53 lets flash attention tell documents apart in a batch of one only; positions restart at each
        # sequence too, so that all of them may lie in one row.
        self.in_one_row = model.config._attn_implementation == "flash_attention_2"

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits `[sequences, seq_len, vocabulary]`."""
        return self.logits(batch)

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """As `forward`, which Composer may have compiled."""
        ids, places = batch["input_ids"], batch["position_ids"]
        shape = ids.shape
        if self.in_one_row:
            ids, places = ids.reshape(1, -1), places.reshape(1, -1)
        # With a cache, transformers 4.53 drops the document mask it derives from position_ids without a word.
        return self.model(input_ids=ids, position_ids=places, use_cache=False).logits.view(*shape, -1)

    def loss(self, outputs: Tensor, batch: dict[str, Tensor], *_: Any, **__: Any) -> Tensor:
        """Mean cross-entropy in nats over the trained tokens of `batch`, a scalar; 0 where there are none."""
        trained = (batch["labels"][:, 1:] != IGNORED).sum().clamp(min=1)  # stays on the device: no sync
        return token_losses(outputs, batch["labels"]).sum() / trained

    def flops_per_batch(self, batch: dict[str, Tensor]) -> float:
        """Of a forward and a backward pass, by this name Composer's SpeedMonitor asks for it.

        A token takes 6 for each parameter and 12 · layers · hidden · seq_len for attention (Chowdhery et al., "PaLM",
        2022, appendix B).
        """
        sequences, length = batch["input_ids"].shape
        config = self.model.config
        layers, hidden = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
        return float(sequences * length * (6 * self.size + 12 * layers * hidden * length))

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
    pretrained, attention = settings.model.get("pretrained"), settings.attn_implementation
    if attention in ("flex_attention", "flash_attention_2") and not torch.cuda.is_available():
        raise UserError(f"setting `attn_implementation: {attention}` needs a GPU, and none is found: take sdpa")
    if attention == "flex_attention":
        cast_before_flex_attention()
    config = configuration(settings, vocab_size, eos_id, pad_id)
    options: dict[str, Any] = {"attn_implementation": attention, dtype_keyword(): torch.float32}
    with sizes_of_transformers():
        if pretrained:
            offline = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
            model = AutoModelForCausalLM.from_pretrained(pretrained, config=config, **offline, **options)
            if model.get_input_embeddings().num_embeddings < vocab_size:
                model.resize_token_embeddings(padded(vocab_size), mean_resizing=False)
        else:
            model = AutoModelForCausalLM.from_config(config, **options)
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            module._fsdp_wrap = True  # what Composer's FSDP gathers at a time; without it, the whole model at once
    if settings.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if settings.liger:
        _apply_liger(model)
    return CausalLM(model)


def _apply_liger(model: PreTrainedModel) -> None:
    """Swap norm, rotary and MLP kernels for Liger's; the loss stays ours."""
    if not torch.cuda.is_available():
        raise UserError("setting `liger` needs a GPU, and none is found: leave it out")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError(f"setting `liger` needs the gpu extra, {install('gpu')}: {one_line(error)[:200]}") from None
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UserError(f"setting `liger`: it has no kernels for `{model.config.model_type}` models: leave it out")
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
