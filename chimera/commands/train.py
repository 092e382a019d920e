"""Pretrain a causal language model from shards: `composer train/main.py CONFIG [key=value ...]`.

The order of things: settings and shards are checked before anything heavy is imported, so that a mistake shows at
once; then data, model, optimizer and callbacks are put together and Composer's Trainer runs.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chimera.cli import FULL, UserError, parse, run, say
from chimera.files import write_whole
from chimera.stores import is_remote, plain_uploads
from chimera.versions import check_versions, complete_composer, say_unproven

if TYPE_CHECKING:
    from chimera.train.data.shards import Shards
    from chimera.train.order.schedule import Plan
    from chimera.train.run.start import Start
    from chimera.train.settings import TrainSettings


def share_cores() -> None:
    """Give each rank of this machine its share of the cores; ranks that all take all of them stand in each other's way.

    Must come before torch is imported. What the user has set stays.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="composer train/main.py", description=__doc__.split("\n")[0])
    _, config, overrides = parse(parser, argv, default_config=None)
    from chimera.train.settings import read_settings

    settings = read_settings(config, overrides)
    check_versions()
    plain_uploads()
    share_cores()

    from chimera.train.data.roots import allow_open_files, open_root
    from chimera.train.step.refusals import cautions, refuse

    allow_open_files()
    shards = open_root(settings)
    plan = shards.plan(settings)
    refuse(settings, plan, shards)
    for caution in cautions(settings, shards) if os.environ.get("RANK", "0") == "0" else ():
        say(f"warning: {caution}")
    with ExitStack() as held:
        return train(settings, config, shards, plan, held)


def train(settings: "TrainSettings", config: Path, shards: "Shards", plan: "Plan", held: ExitStack) -> int:
    """Train to `max_duration`, with `held` holding the run's folder; returns the exit code."""
    from composer import Time, TimeUnit
    from composer.utils import dist, get_device

    from chimera.train.order.run_plan import end_step
    from chimera.train.run.checkpoints import PREEMPTED, StopRequested, lock_folder, stop_with_parent
    from chimera.train.run.ranks import check_ranks_agree, run_on_ranks
    from chimera.train.run.run_store import RunStore, run_folder
    from chimera.train.run.start import Start, choose_start, fetch_to_node, on_this_node, remove_copy

    complete_composer()
    stop_with_parent()
    until = Time(end_step(settings.max_duration, plan.steps), TimeUnit.BATCH)
    folder = run_folder(settings.run_name, settings.save_folder)
    remote = is_remote(settings.save_folder)
    dist.initialize_dist(get_device(None), timeout=settings.dist_timeout)
    check_ranks_agree(settings, shards, plan)
    leader = dist.get_global_rank() == 0

    def decide() -> Start:
        held.enter_context(lock_folder(folder))
        held.callback(remove_copy, folder)
        return choose_start(settings, folder)

    start: Start = run_on_ranks(decide if leader else None)[0]
    if start.path is not None and start.step >= until.value:
        if leader:
            say(f"finished: {start.path} is at step {start.step} of {until.value}; nothing to do")
        return 0
    plan.check_ranks(dist.get_world_size(), start.step)
    if leader:
        say_unproven()
        parent = None if start.own else start.parent
        began = f", a branch of {parent.run_name}" if parent else ""
        say(f"starting at step {start.step} of {until.value}" + (f" from {start.path}" if start.path else "") + began)
    load_path = None
    if start.path is not None:
        load_path = str(on_this_node(start.path, folder))
        other_node = dist.get_local_rank() == 0 and not leader
        if other_node:
            held.callback(remove_copy, folder)
        run_on_ranks(partial(fetch_to_node, start.path, folder) if other_node else None)

    trainer = build_trainer(settings, config, shards, plan, folder, until, load_path, start)
    remove_copy(folder)
    code, words = 0, f"done: {until.value} steps, checkpoints and steps.jsonl in {settings.save_folder}"
    if remote:
        words += f"; the report reads {folder}"
    try:
        trainer.fit()
    except StopRequested as stop:
        code, words = PREEMPTED, f"{stop}: start again with `autoresume=true` to go on"
    except BaseException as error:
        trainer.engine.close()  # not trainer.close(): it waits for the other ranks, which wait for this one
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(
                f"no space left on the disk of {error.filename or folder}: make room and start again with "
                "`autoresume=true`; the run goes on from its newest complete checkpoint"
            ) from None
        raise
    trainer.close()
    if leader and remote:
        RunStore(settings.save_folder).push_files(folder)  # with what came after the last checkpoint
    if leader:
        say(words)
    return code


def build_trainer(
    settings: "TrainSettings",
    config: Path,
    shards: "Shards",
    plan: "Plan",
    folder: Path,
    until: Any,
    load_path: str | None,
    start: "Start",
) -> Any:
    """Composer's Trainer over the mixture, with everything the settings ask for.

    Args:
        load_path: the checkpoint of `start` on this node; None: from nothing.
    """
    import torch
    from composer import DataSpec, Trainer
    from composer.callbacks import LRMonitor, SpeedMonitor
    from composer.utils import dist, get_device

    from chimera.train.data.mixture import MixtureDataset
    from chimera.train.order.run_plan import eval_streams
    from chimera.train.run.callbacks import About, ProgressLines, SetOptimizer, clipping
    from chimera.train.run.checkpoints import Checkpoints, RestoreRandomState
    from chimera.train.run.curriculum import (
        Curriculum,
        MixtureLoader,
        count_samples,
        count_tokens,
        microbatch,
        precision_of,
    )
    from chimera.train.run.evaluate import Generate, evaluators
    from chimera.train.run.loggers import loggers
    from chimera.train.run.monitor import Monitor
    from chimera.train.run.ranks import run_on_ranks
    from chimera.train.run.step_files import archive
    from chimera.train.step.collate import LabelRules
    from chimera.train.step.configuration import check_tokens
    from chimera.train.step.model import build_model
    from chimera.train.step.model_checks import check_device
    from chimera.train.step.optimizer import build_optimizer

    device = get_device(None)

    # Model
    torch.manual_seed(settings.seed)  # the same weights on every rank and on every topology
    tokenizer = shards.tokenizer
    on_gpu = device.name == "gpu"
    check_device(settings, on_gpu)
    model = build_model(settings, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    check_tokens(
        shards.largest_ids([*plan.streams, *eval_streams(settings, plan)]),
        model.model.get_input_embeddings().num_embeddings,
    )
    precision = precision_of(settings, on_gpu)
    about = About(model, shards, settings, precision, plan.steps, start.parent)
    if load_path is not None:
        check = partial(about.check, Path(load_path), start.own)
        settings.optimizer.weight_decay_on = run_on_ranks(check if dist.get_global_rank() == 0 else None)[0]
    settings.optimizer.weight_decay_on = settings.optimizer.weight_decay_on or "matrices"  # recorded as decided

    # Data
    dataset = MixtureDataset(
        root=settings.shards,
        cache=settings.cache,
        plan=plan,
        seed=settings.seed,
        cache_limit=settings.cache_limit,
        predownload=settings.predownload,
    )
    unpacked = frozenset(i for i, name in enumerate(plan.streams) if shards.streams[name].packing == "none")
    loader = MixtureLoader(dataset, unpacked, settings.num_workers)
    count = partial(count_tokens, pad_id=tokenizer.pad_id)
    data = DataSpec(loader, get_num_samples_in_batch=count_samples, get_num_tokens_in_batch=count)
    rules = LabelRules.of(tokenizer, settings)

    restore = RestoreRandomState()
    tokens_at_once = microbatch(settings, plan, dist.get_world_size(), on_gpu)
    callbacks = [
        restore,
        # before Curriculum, both: they read the batch as the loader gave it
        Monitor(plan, folder, config, tokenizer.pad_id, start.parent),
        about,
        Curriculum(plan, rules, tokens_at_once),
        SetOptimizer(settings, plan.steps),
        SpeedMonitor(window_size=10),
        LRMonitor(),
        *([] if sys.stderr.isatty() else [ProgressLines(until.value)]),
        *([Generate(settings.generate, shards)] if settings.generate.interval else []),
        Checkpoints(settings.save_folder, folder, settings.save_interval, settings.save_keep),
    ]
    trainer = Trainer(
        run_name=settings.run_name,
        model=model,
        train_dataloader=data,
        optimizers=build_optimizer(model.model, settings),
        algorithms=clipping(settings.optimizer.clip_norm),
        max_duration=until,
        eval_dataloader=evaluators(settings, shards, plan, rules, tokens_at_once) or None,
        callbacks=callbacks,
        loggers=loggers(settings, folder, start.parent),
        progress_bar=settings.progress_bar and sys.stderr.isatty(),
        log_to_console=False,
        load_path=load_path,
        load_progress_bar=False,
        device=device,
        precision=precision,
        device_train_microbatch_size="auto" if tokens_at_once is None else 1,  # set at each stage
        accumulate_train_batch_on_tokens=True,
        parallelism_config=settings.parallelism or None,
        compile_config={} if settings.compile else None,
        seed=settings.seed,
        dist_timeout=settings.dist_timeout,
    )
    restore.trainer = trainer
    if not start.own and dist.get_global_rank() == 0:
        for name in ("steps.jsonl", "metrics.jsonl", "starts.jsonl"):
            archive(folder / name, "begins anew from a checkpoint of elsewhere")
    record(settings, shards, folder, trainer, start)
    return trainer


def record(settings: "TrainSettings", shards: "Shards", folder: Path, trainer: Any, start: "Start") -> None:
    """Store and log what the run is made of: settings, versions, the shards' digest (no secrets among them)."""
    import json
    from importlib.metadata import version

    from composer.utils import dist

    packages = ("mosaicml", "mosaicml-streaming", "torch", "transformers", "numpy")
    about = {
        "settings": settings.model_dump(),
        "versions": {"chimera": __import__("chimera").__version__} | {name: version(name) for name in packages},
        "manifest": shards.digest,
        "block_len": shards.block_len,
        "blocks": {name: stream.train.blocks for name, stream in shards.streams.items()},
        "tokens": {name: stream.train.tokens for name, stream in shards.streams.items()},
        "indexes": {name: stream.train.index for name, stream in shards.streams.items()},
        "ranks": dist.get_world_size(),
        "from_step": trainer.state.timestamp.batch.value,
    } | ({"parent": start.parent.model_dump()} if start.parent else {})
    trainer.logger.log_hyperparameters(about)
    if dist.get_global_rank() == 0:
        text = json.dumps(about, indent=2, default=str) + "\n"
        write_whole(folder / "config.json", text.encode(), sync="nothing")
        with (folder / "starts.jsonl").open("a") as file:
            kept = ("from_step", "ranks", "versions", "manifest", "parent")
            file.write(json.dumps({key: about[key] for key in kept if key in about}) + "\n")


def entry() -> None:
    """Run `main`; a mistake that all ranks find is printed by the first alone."""

    def quietly(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except UserError:
            if os.environ.get("RANK", "0") != "0":
                time.sleep(10)  # rank 0 prints it and the launcher ends us; if not, it is ours alone to print
            raise

    run(quietly)
