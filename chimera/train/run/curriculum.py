"""Callback: the sequence length of each step.

On `AFTER_DATALOADER`, when Composer has counted the batch, a step's blocks are viewed at the step's sequence
length, and the microbatch is set so that a device takes about the same number of tokens at every stage.
"""

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Logger, State
from composer.core import get_precision_context
from composer.utils import dist
from streaming import StreamingDataLoader
from torch.nn.parallel import DistributedDataParallel

from chimera.cli import UserError, say
from chimera.text import one_line
from chimera.train.data.mixture import MixtureDataset
from chimera.train.order.schedule import Plan
from chimera.train.settings import TrainSettings
from chimera.train.step.collate import (
    LabelRules,
    StepInfo,
    collate,
    cut_tokens,
    real_tokens,
    trained_tokens,
    view_sequences,
)
from chimera.train.step.model_checks import check_causal, check_document_mask, logits_alone

_SHAPES = re.compile(
    r"size of tensor a|shapes cannot be multiplied|is invalid for input of size|must match the size|index out of range"
)

_CHECKED = 512  # tokens of the sequences that `check_causal` and `check_document_mask` look at, whatever the stage's


class Curriculum(Callback):
    """Views blocks as sequences and sets the microbatch.

    Args:
        plan: the run's step plan.
        rules: what labels depend on.
        microbatch_tokens: tokens a device takes at once; None leaves the microbatch to Composer.
    """

    def __init__(self, plan: Plan, rules: LabelRules, microbatch_tokens: int | None) -> None:
        self.plan = plan
        self.rules = rules
        self.microbatch_tokens = microbatch_tokens
        self.seq_len = self.sequences = self.graphs = 0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Before the first step: no token sees what follows, documents are told apart, the longest stage ahead fits."""
        step = state.timestamp.batch.value
        ahead = [segment for segment in self.plan.segments if segment.end_step > step]
        if not ahead:
            return
        seq_len = min(segment.seq_len for segment in ahead)
        check_sequences(state, seq_len, max(segment.seq_len for segment in ahead), self.rules.document_mask)
        heaviest = max(ahead, key=lambda segment: (segment.seq_len, segment.sequences_per_step))
        rank_sequences = heaviest.sequences_per_step // dist.get_world_size()
        # Where Composer finds the microbatch, one sequence is the least it can come to.
        sequences = self._microbatch(heaviest.seq_len, rank_sequences) if self.microbatch_tokens else 1
        try:
            with _sizes_that_fit():
                _trial(state, sequences, heaviest.seq_len)
        except RuntimeError as error:
            if "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error).lower():
                raise
            raise UserError(
                f"out of memory at the longest stage ahead: {sequences} sequences of {heaviest.seq_len} tokens at "
                f"once (phase {heaviest.phase_name}, from step {heaviest.first_step}): lower "
                f"`device_train_microbatch_tokens` (now {self.microbatch_tokens or 'auto'}), or set "
                "`activation_checkpointing: true`"
            ) from None

    def after_dataloader(self, state: State, logger: Logger) -> None:
        batch: dict[str, Any] = state.batch
        info: StepInfo = batch["info"]
        if (cut := cut_tokens(batch, self.rules.pad_id)) > 0:
            logger.log_metrics({"data/tokens_parted_from_their_document": cut})
        state.batch = view_sequences(batch, self.rules)
        # Also where a phase changes the batch alone: a run resumed in it must cut it as one that came to it does.
        if (info.seq_len, info.sequences) != (self.seq_len, self.sequences):
            size = self._microbatch(info.seq_len, info.sequences)
            if self.microbatch_tokens is None and self.seq_len:  # what Composer found fits; go on from there
                size = max(1, min(size, int(state.device_train_microbatch_size or size) * self.seq_len // info.seq_len))
            state.device_train_microbatch_size = size
            self.seq_len, self.sequences = info.seq_len, info.sequences
            if dist.get_global_rank() == 0:
                say(
                    f"step {info.step}: phase {info.phase}, sequences of {info.seq_len} tokens, "
                    f"{info.sequences} a rank, {state.device_train_microbatch_size} at once"
                )
        logger.log_metrics({"curriculum/seq_len": info.seq_len})

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log how many graphs `torch.compile` has made; past the second length it makes one for any length."""
        graphs = _compiled_graphs()
        if graphs != self.graphs:
            logger.log_metrics({"curriculum/compiled_graphs": graphs})
            if dist.get_global_rank() == 0:
                say(f"torch.compile: {graphs} graphs so far, at sequences of {self.seq_len} tokens")
            self.graphs = graphs

    def _microbatch(self, seq_len: int, rank_sequences: int) -> int:
        """Sequences a device takes at once, at least one and at most its share of the step."""
        if self.microbatch_tokens is None:
            return rank_sequences
        return max(1, min(rank_sequences, self.microbatch_tokens // seq_len))


def check_sequences(state: State, seq_len: int, longest: int, document_mask: bool) -> None:
    """Raise `UserError` unless no token sees what follows, documents are told apart and the evaluators' lengths fit.

    Args:
        seq_len: tokens of the sequences that are looked at, `_CHECKED` at most.
        longest: tokens of a sequence that need no pass of their own to see whether they fit.
        document_mask: whether documents are told apart.
    """
    seq_len = min(_CHECKED, seq_len)
    evaluated = max((_eval_len(evaluator) for evaluator in state.evaluators), default=0)
    with get_precision_context(state.precision, state.precision_config), _sizes_that_fit():
        check_causal(_module(state), seq_len)
        if document_mask:
            check_document_mask(_module(state), seq_len)
        if evaluated > longest:
            places = torch.arange(evaluated)
            logits_alone(_module(state), places, places.remainder(7))


def _module(state: State) -> Any:
    """The `CausalLM`, out of its wrapper."""
    return state.model.module if isinstance(state.model, DistributedDataParallel) else state.model


@contextmanager
def _sizes_that_fit() -> Iterator[None]:
    """Raise `UserError` for sizes of a model that `transformers` accepts and its forward pass does not."""
    try:
        yield
    except (RuntimeError, IndexError) as error:  # the latter: a table of positions that ends before the sequence
        if not _SHAPES.search(str(error)):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"setting `model`: its sizes do not fit together ({Path(place.filename).name}, line {place.lineno}: "
            f"{one_line(error)[:300]}): `hidden_size` is usually an even multiple of `num_attention_heads`, and that a "
            "multiple of `num_key_value_heads`; a model with a table of positions (`n_positions`, ...) takes no longer "
            "sequences than that"
        ) from None


def _trial(state: State, sequences: int, seq_len: int) -> None:
    """One forward and backward pass on random tokens; leaves weights, gradients and random state as they were."""
    parameters = [p for p in state.model.parameters() if p.requires_grad]
    device = parameters[0].device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        ids = torch.randint(0, 2, (sequences, seq_len), device=device)
        places = torch.arange(seq_len, device=device).expand_as(ids)
        batch = {"input_ids": ids, "labels": ids, "position_ids": places}
        # Not yet allocated: the optimizer's two moments, unless a checkpoint brought them.
        moments = []
        if device.type == "cuda" and not any(optimizer.state for optimizer in state.optimizers):
            moments = [torch.empty_like(p) for p in parameters for _ in range(2)]
        model: Any = state.model
        alone: Callable[[], Any] = model.no_sync if isinstance(model, DistributedDataParallel) else torch.enable_grad
        with alone():
            with get_precision_context(state.precision, state.precision_config):
                loss = _module(state).loss(model(batch), batch)
            loss.backward()
        del moments, loss
    for parameter in parameters:
        parameter.grad = None


def _eval_len(evaluator: Any) -> int:
    """Tokens in a sequence of an evaluator's."""
    return int(evaluator.dataloader.dataloader.dataset.seq_len)


def _compiled_graphs() -> int:
    """Graphs that `torch.compile` has made in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"].get("unique_graphs", 0))


def count_samples(batch: dict[str, Any]) -> int:
    """This rank's sequences in a step's blocks or in a view of them: what Composer's cursor counts."""
    return batch["info"].sequences if "info" in batch else len(batch["input_ids"])


def count_tokens(batch: dict[str, Any], pad_id: int) -> dict[str, float]:
    """This rank's tokens in a step's blocks or in a view of them, without padding, and those a loss is computed for.

    The latter are a little above 0 at least: Composer weighs microbatches by them, and a step in which nothing is
    trained (`train_on: assistant`) would divide by zero.
    """
    if "info" in batch:
        total = int(real_tokens(batch, pad_id, 1 + max(batch["info"].numbers)).sum())
        return {"total": total, "loss_generating": float(total)}
    total = int((batch["input_ids"] != pad_id).sum())
    return {"total": total, "loss_generating": max(1e-9, float(trained_tokens(batch["labels"])))}


class MixtureLoader(StreamingDataLoader):
    """A loader of whole steps, each collated into tensors here and not in the workers.

    Records cross from a worker as numpy arrays, four times as fast as tensors, which take a file handle each.

    Args:
        dataset: its records are the steps.
        unpacked_streams: indices of the streams packed `none`.
        num_workers: processes that read ahead; 0 reads in this one.
    """

    def __init__(self, dataset: MixtureDataset, unpacked_streams: frozenset[int] = frozenset(), num_workers: int = 0):
        super().__init__(
            dataset, batch_size=None, collate_fn=as_read, num_workers=num_workers, worker_init_fn=stop_with_run
        )
        self.unpacked_streams = unpacked_streams

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for record in super().__iter__():
            yield collate(record, self.unpacked_streams)

    def _get_batch_size(self, batch: dict[str, Any]) -> int:
        return int(batch["sequences"])

    def __len__(self) -> int:
        """Composer must never see an epoch end.

        With one, the plan's last step would begin epoch 1 at sample 0, and a run whose plan is prolonged later would
        resume at its beginning.
        """
        raise TypeError("a run's steps have no epoch")


def as_read(record: dict[str, Any]) -> dict[str, Any]:
    return record


def stop_with_run(_worker: int) -> None:
    """Have this worker end at its parent's SIGTERM alone: at one that all processes get, the run is still to save."""

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # in threads to come too
    threading.Thread(target=wait, daemon=True).start()


def precision_of(settings: TrainSettings, on_gpu: bool) -> str:
    """Composer's name of what the forward pass is computed in."""
    if settings.precision != "auto":
        return settings.precision
    return "amp_bf16" if on_gpu else "fp32"


def microbatch(settings: TrainSettings, plan: Plan, ranks: int, on_gpu: bool) -> int | None:
    """Tokens a device takes at once; None: Composer finds out (on a GPU). On a CPU `auto` is the whole batch."""
    tokens = settings.device_train_microbatch_tokens
    if tokens != "auto":
        return int(tokens)
    if on_gpu:
        return None
    return max(segment.sequences_per_step * segment.seq_len for segment in plan.segments) // ranks
