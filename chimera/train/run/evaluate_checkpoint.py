"""Evaluation of a checkpoint alone: the evaluators of a run, under Composer, without training."""

import math
import sys
import warnings
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.utils import get_device

from chimera.cli import UserError, say
from chimera.train.data.shards import Shards
from chimera.train.order.run_plan import eval_streams
from chimera.train.order.schedule import Plan
from chimera.train.run.callbacks import About
from chimera.train.run.checkpoint_file import check_sums
from chimera.train.run.curriculum import check_sequences, microbatch, precision_of
from chimera.train.run.evaluate import evaluators
from chimera.train.settings import TrainSettings
from chimera.train.step.collate import LabelRules
from chimera.train.step.configuration import check_tokens
from chimera.train.step.model import build_model
from chimera.train.step.model_checks import check_device

Results = dict[str, dict[int, dict[str, Any]]]  # by stream and sequence length


def evaluate(settings: TrainSettings, shards: Shards, plan: Plan, checkpoint: Path) -> tuple[int, Results]:
    """The step of a checkpoint, and its loss (nats), perplexity and trained tokens by stream and sequence length.

    The numbers are those that a run of `settings`, whose `eval.interval` is not 0, logs at that step. Loss and
    perplexity are None where there is no token to compute them over, or where they are no finite number.

    Raises:
        UserError: the checkpoint is of another model or tokenizer, or no stream has an eval split.
    """
    device = get_device(None)
    on_gpu = device.name == "gpu"
    check_device(settings, on_gpu)
    tokenizer = shards.tokenizer
    model = build_model(settings, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    check_tokens(shards.largest_ids(eval_streams(settings, plan)), model.model.get_input_embeddings().num_embeddings)
    precision = precision_of(settings, on_gpu)
    check_sums(checkpoint)
    state = About(model, shards, settings, precision, plan.steps).read(checkpoint, own=False)
    seen = state["dataset_state"]["train"]
    warn_of_other_shards(seen, shards)
    model.load_state_dict(state["model"])

    rules = LabelRules.of(tokenizer, settings)
    found = evaluators(settings, shards, plan, rules, microbatch(settings, plan, 1, on_gpu))
    if not found:
        raise UserError(
            f"no stream of the plan has an eval split in the shards at {shards.where}: build them with `eval_fraction` "
            "above 0 or with `eval_sources`; beside shards made by others, name a root that has such streams"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No optimizer was specified")
        trainer = Trainer(
            model=model,
            eval_dataloader=found,
            progress_bar=settings.progress_bar and sys.stderr.isatty(),
            log_to_console=False,
            device=device,
            precision=precision,
            compile_config={} if settings.compile else None,
            seed=settings.seed,
        )
    lengths = {evaluator.dataloader.dataloader.dataset.seq_len for evaluator in found}
    check_sequences(trainer.state, min(lengths), 0, settings.document_mask)
    trainer.eval()
    results: Results = {}
    for label, metrics in trainer.state.eval_metrics.items():
        stream, seq_len = label.removeprefix("eval/").rsplit("/", 1)
        tokens = int(metrics["loss"].tokens)
        values = {name: metrics[name].compute().item() for name in ("loss", "perplexity")}
        known = {name: value if tokens and math.isfinite(value) else None for name, value in values.items()}
        results.setdefault(stream, {})[int(seq_len)] = {**known, "tokens": tokens}
    trainer.close()
    return int(seen["step"]), results


def warn_of_other_shards(seen: dict[str, Any], shards: Shards) -> None:
    """Say which stream's index is another than a checkpoint was trained on (`seen`: its state of the data)."""
    for name, blocks in seen["consumed"].items():
        if blocks and name in shards.streams and shards.streams[name].train.index != seen["fingerprints"][name]:
            say(
                f"warning: stream {name} at {shards.root_of(name)} is not the one that the checkpoint was trained on: "
                "its eval split may hold other documents, also some that were trained on"
            )
