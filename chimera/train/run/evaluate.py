"""Evaluation between steps: loss and perplexity of each stream's `eval` split, and sample generations."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from composer import Callback, DataSpec, Evaluator, Logger, State
from composer.core import get_precision_context
from composer.utils import dist
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, IterableDataset

from chimera.cli import UserError, say
from chimera.text import one_line
from chimera.train.data.cache import ShardCache
from chimera.train.data.index import read_index
from chimera.train.data.reader import BlockReader
from chimera.train.data.shards import Shards
from chimera.train.order.run_plan import eval_lengths, eval_streams
from chimera.train.order.schedule import Plan
from chimera.train.settings import GenerateSettings, TrainSettings
from chimera.train.step.collate import LabelRules, StepInfo, view_sequences

BATCH_BLOCKS = 4  # a rank reads at once


class EvalBlocks(IterableDataset):
    """The first blocks of one stream's eval split, this rank's share, viewed at one sequence length.

    Every rank yields the same number of batches; where blocks run out, a block of PAD stands in, which no loss is
    computed for - so the metric is over each block exactly once.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        assistant: np.ndarray | None,
        seq_len: int,
        batch_blocks: int,
        rules: LabelRules,
        starts: bool = False,
    ) -> None:
        """`starts`: the masks say where documents start."""
        self.tokens, self.assistant, self.starts = tokens, assistant, starts
        self.seq_len, self.batch_blocks, self.rules = seq_len, batch_blocks, rules

    def __len__(self) -> int:
        return -(-len(self.tokens) // (self.batch_blocks * dist.get_world_size()))

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        block_len = self.tokens.shape[1]
        for i in range(len(self)):
            first = (i * dist.get_world_size() + dist.get_global_rank()) * self.batch_blocks
            here = slice(first, first + self.batch_blocks)
            fill = self.rules.pad_id if self.rules.pad_id >= 0 else self.rules.eos_id
            tokens = np.full((self.batch_blocks, block_len), fill, np.int64)
            tokens[: len(self.tokens[here])] = self.tokens[here]
            said = None
            if self.assistant is not None:
                said = np.zeros(tokens.shape, bool)
                said[: len(self.assistant[here])] = self.assistant[here]
            info = StepInfo(
                step=i,
                phase="eval",
                seq_len=self.seq_len,
                digest="",
                streams={},
                first_sequence=0,
                sequences=tokens.size // self.seq_len,
                unpacked=(),
                starts=(self.starts,) * self.batch_blocks,
            )
            batch = {
                "tokens": torch.from_numpy(tokens),
                "assistant": None if said is None else torch.from_numpy(said),
                "info": info,
            }
            yield view_sequences(batch, self.rules)


def evaluators(
    settings: TrainSettings, shards: Shards, plan: Plan, rules: LabelRules, microbatch_tokens: int | None
) -> list[Evaluator]:
    """One evaluator a stream and sequence length: `metrics/eval/<stream>/<seq_len>/{loss,perplexity}`.

    Args:
        microbatch_tokens: tokens a device takes at once in training, and so here; None: one sequence.

    Raises:
        UserError: a length of `eval.seq_lens` does not divide the blocks.
    """
    if not settings.eval.interval:
        return []
    lengths = eval_lengths(settings, plan)
    found = []
    for stream in eval_streams(settings, plan):
        known = shards.streams[stream]
        count = min(settings.eval.blocks, known.eval.blocks)
        if not count:
            if dist.get_global_rank() == 0:
                say(f"stream {stream} has no eval split: not evaluated")
            continue
        index = read_index(shards.root_of(stream), stream, settings.cache, "eval", known)
        reader = BlockReader({stream: index}, ShardCache(settings.cache), shards.block_len)
        tokens, assistant = reader.read(np.zeros(count, np.int64), np.arange(count))
        for seq_len in lengths:
            blocks = EvalBlocks(tokens, assistant, seq_len, min(BATCH_BLOCKS, len(tokens)), rules, known.starts)
            in_batch = blocks.batch_blocks * shards.block_len
            # A generator of its own: a loader draws a seed at each pass, which would move the run's random state.
            loader = DataLoader(blocks, batch_size=None, generator=torch.Generator())
            spec = DataSpec(loader, get_num_samples_in_batch=lambda batch: len(batch["input_ids"]))
            found.append(
                Evaluator(
                    label=f"eval/{stream}/{seq_len}",
                    dataloader=spec,
                    metric_names=["loss", "perplexity"],
                    eval_interval=f"{settings.eval.interval}ba",
                    device_eval_microbatch_size=max(1, min(microbatch_tokens or 0, in_batch) // seq_len),
                )
            )
    return found


class Generate(Callback):
    """Greedy continuations of the prompts every `interval` steps; greedy draws nothing from the random state."""

    def __init__(self, settings: GenerateSettings, shards: Shards) -> None:
        self.settings = settings
        self.tokenizer = shards.tokenizer

    def fit_start(self, state: State, logger: Logger) -> None:
        """Check the prompts before step 0: one beyond a table of positions would end a later step in a traceback."""
        module: Any = state.model.module if hasattr(state.model, "module") else state.model
        positions = getattr(module.model.config, "max_position_embeddings", None)
        for prompt in self.settings.prompts:
            count, more = len(self.tokenizer.encode(prompt)), self.settings.max_new_tokens
            if positions is not None and count + more > positions:
                raise UserError(
                    f"setting `generate`: the prompt {one_line(prompt)[:60]!r} has {count} tokens, with "
                    f"`max_new_tokens` {more} more than the model's {positions} positions: lower `max_new_tokens`"
                )

    def batch_end(self, state: State, logger: Logger) -> None:
        step = state.timestamp.batch.value
        if step % self.settings.interval:
            return
        module: Any = state.model.module if hasattr(state.model, "module") else state.model
        module.eval()
        rows = []
        with torch.no_grad(), whole_parameters(module), get_precision_context(state.precision, state.precision_config):
            for prompt in self.settings.prompts:
                ids = torch.tensor([self.tokenizer.encode(prompt)], device=state.device._device)
                made = module.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=self.settings.max_new_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=max(0, self.tokenizer.pad_id),
                    eos_token_id=self.tokenizer.eos_id,
                )
                rows.append([prompt, self.tokenizer.decode(made[0, ids.shape[1] :].tolist())])
        module.train()
        logger.log_table(columns=["prompt", "continuation"], rows=rows, name="generate", step=step)
        if dist.get_global_rank() == 0:
            for prompt, text in rows:
                say(f"step {step}: {prompt!r} → {text!r}")


def whole_parameters(module: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gather all parameters on every rank inside: `generate` skips the forward in which FSDP gathers them."""
    if not any(isinstance(part, FullyShardedDataParallel) for part in module.modules()):
        return contextlib.nullcontext()
    whole: contextlib.AbstractContextManager[None] = FullyShardedDataParallel.summon_full_params(
        module, writeback=False
    )
    return whole
