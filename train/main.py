"""Pretrain a causal language model from shards: `composer train/main.py CONFIG [key=value ...]`.

The order of things: settings and shards are checked before anything heavy is imported, so that a mistake shows at
once; then data, model, optimizer and callbacks are put together and Composer's Trainer runs.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.cli import FULL, UserError, parse, run, say
from chimera.stack import check_stack
from chimera.stores import is_remote, plain_uploads
from train.settings import TrainSettings, end_step, plan_of, read_settings

if TYPE_CHECKING:
    from train.schedule import Plan
    from train.shards import Shards


def share_cores() -> None:
    """Give each rank of this machine its share of the cores; ranks that all take all of them stand in each other's way.

    Must come before torch is imported. What the user has set stays.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))


def allow_open_files() -> None:
    """Let this process open as many files as the system allows it: every shard in use is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS allows fewer than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="composer train/main.py", description=__doc__.split("\n")[0])
    _, config, overrides = parse(parser, argv, default_config=None)
    settings = read_settings(config, overrides)
    check_stack()
    plain_uploads()
    share_cores()
    allow_open_files()

    shards = open_root(settings)
    plan = plan_of(settings, shards.block_len)
    shards.check(plan.streams)
    shards.check_tokenizer(settings.tokenizer)
    with ExitStack() as held:
        return train(settings, config, shards, plan, held)


def open_root(settings: TrainSettings) -> "Shards":
    """The shards root: one of ours, or token shards made by others when the config names their tokenizer."""
    from train.shards import fetch, open_shards

    if settings.tokenizer is not None and fetch(settings.shards, "manifest.json", settings.cache) is None:
        from train.foreign import open_foreign

        streams = dict.fromkeys(name for phase in settings.phases for name in phase.proportions)
        return open_foreign(settings.shards, settings.cache, settings.tokenizer, list(streams))
    return open_shards(settings.shards, settings.cache)


def train(settings: TrainSettings, config: Path, shards: "Shards", plan: "Plan", held: ExitStack) -> int:
    """Train to `max_duration`, with `held` holding the run's folder; returns the exit code."""
    from composer import Time, TimeUnit
    from composer.utils import dist, get_device

    from train.checkpoints import PREEMPTED, StopRequested, lock_folder, stop_with_parent
    from train.ranks import agree, together
    from train.run_store import RunStore, run_folder
    from train.schedulers import check_scheduler
    from train.start import Start, bring, choose_start, forget, on_this_node

    stop_with_parent()
    check_scheduler(settings.scheduler, plan.steps)
    until = Time(end_step(settings.max_duration, plan.steps), TimeUnit.BATCH)
    folder = run_folder(settings.run_name, settings.save_folder)
    remote = is_remote(settings.save_folder)
    dist.initialize_dist(get_device(None), timeout=settings.dist_timeout)
    agree(settings, shards, plan)
    leader = dist.get_global_rank() == 0

    def decide() -> Start:
        held.enter_context(lock_folder(folder))
        held.callback(forget, folder)
        return choose_start(settings, folder)

    start: Start = together(decide if leader else None)[0]
    if start.path is not None and start.step >= until.value:
        if leader:
            say(f"finished: {start.path} is at step {start.step} of {until.value}; nothing to do")
        return 0
    plan.check_ranks(dist.get_world_size(), start.step)
    if leader:
        say(f"starting at step {start.step} of {until.value}" + (f" from {start.path}" if start.path else ""))
    load_path = None
    if start.path is not None:
        load_path = str(on_this_node(start.path, folder))
        other_node = dist.get_local_rank() == 0 and not leader
        if other_node:
            held.callback(forget, folder)
        together(partial(bring, start.path, folder) if other_node else None)

    trainer = build_trainer(settings, config, shards, plan, folder, until, load_path, start.own)
    forget(folder)
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
    settings: TrainSettings,
    config: Path,
    shards: "Shards",
    plan: "Plan",
    folder: Path,
    until: Any,
    load_path: str | None,
    own: bool = True,
) -> Any:
    """Composer's Trainer over the mixture, with everything the settings ask for.

    Args:
        load_path: a checkpoint on this node; None: from nothing.
        own: whether it is one of the run's own folder.
    """
    import torch
    from composer import DataSpec, Trainer
    from composer.callbacks import LRMonitor, SpeedMonitor
    from composer.optim import DecoupledAdamW
    from composer.utils import dist, get_device

    from train.callbacks import About, ProgressLines, SetOptimizer, clipping, loggers
    from train.checkpoints import Checkpoints, RestoreRandomState
    from train.collate import Marks
    from train.curriculum import Curriculum, MixtureLoader, count_samples, count_tokens, microbatch
    from train.evaluate import Generate, evaluators
    from train.mixture import MixtureDataset
    from train.model import build_model
    from train.model_checks import check_parallelism, check_pretrained, check_tokens
    from train.monitor import Monitor, set_aside
    from train.ranks import together

    device = get_device(None)

    # Model
    torch.manual_seed(settings.seed)  # the same weights on every rank and on every topology
    tokenizer = shards.tokenizer
    check_parallelism(settings.parallelism)
    check_pretrained(settings.model.get("pretrained"), tokenizer.path)
    model = build_model(settings, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    check_tokens(shards.streams, plan.streams, model.model.get_input_embeddings().num_embeddings)
    about = About(model, shards, settings)
    if load_path is not None:
        together(partial(about.check, Path(load_path), own) if dist.get_global_rank() == 0 else None)

    # Data
    dataset = MixtureDataset(
        root=settings.shards,
        cache=settings.cache,
        plan=plan,
        seed=settings.seed,
        cache_limit=settings.cache_limit,
        predownload=settings.predownload,
    )
    unpacked = frozenset(i for i, name in enumerate(plan.streams) if shards.packing(name) == "none")
    loader = MixtureLoader(dataset, unpacked, settings.num_workers)
    data = DataSpec(loader, get_num_samples_in_batch=count_samples, get_num_tokens_in_batch=count_tokens)
    marks = Marks(tokenizer.eos_id, tokenizer.pad_id, settings.train_on, settings.document_mask)

    # Optimizer
    options = settings.optimizer
    optimizer = DecoupledAdamW(
        model.parameters(),
        lr=options.lr,
        betas=(options.betas[0], options.betas[1]),
        eps=options.eps,
        weight_decay=options.weight_decay,
    )

    restore = RestoreRandomState()
    on_gpu = device.name == "gpu"
    precision = settings.precision if settings.precision != "auto" else ("amp_bf16" if on_gpu else "fp32")
    if precision != "fp32" and not on_gpu:
        raise UserError(f"setting `precision: {precision}` needs a GPU, and none is found: take auto or fp32")
    tokens_at_once = microbatch(settings, plan, dist.get_world_size(), on_gpu)
    callbacks = [
        restore,
        Monitor(plan, folder, config),  # before Curriculum: it reads the batch as the loader gave it
        Curriculum(plan, marks, tokens_at_once),
        SetOptimizer(settings, plan.steps),
        about,
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
        optimizers=optimizer,
        algorithms=clipping(options.clip_norm),
        max_duration=until,
        eval_dataloader=evaluators(settings, shards, plan, marks, tokens_at_once) or None,
        callbacks=callbacks,
        loggers=loggers(settings, folder),
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
    if not own and dist.get_global_rank() == 0:
        for name in ("steps.jsonl", "metrics.jsonl", "starts.jsonl"):
            set_aside(folder / name, "begins anew from a checkpoint of elsewhere")
    record(settings, shards, folder, trainer)
    return trainer


def record(settings: TrainSettings, shards: "Shards", folder: Path, trainer: Any) -> None:
    """Store and log what the run is made of: settings, versions, the shards' digest (no secrets among them)."""
    import json
    from importlib.metadata import version

    from composer.utils import dist

    packages = ("mosaicml", "mosaicml-streaming", "torch", "transformers", "numpy")
    about = {
        "settings": asdict(settings),
        "versions": {"chimera": __import__("chimera").__version__} | {name: version(name) for name in packages},
        "manifest": shards.digest,
        "block_len": shards.block_len,
        "blocks": {name: stream["train"]["blocks"] for name, stream in shards.streams.items()},
        "indexes": {name: stream["train"].get("index") for name, stream in shards.streams.items()},
        "ranks": dist.get_world_size(),
        "from_step": trainer.state.timestamp.batch.value,
    }
    trainer.logger.log_hyperparameters(about)
    if dist.get_global_rank() == 0:
        whole = folder / ".config.json.tmp"
        whole.write_text(json.dumps(about, indent=2, default=str) + "\n")
        whole.replace(folder / "config.json")
        with (folder / "starts.jsonl").open("a") as file:
            file.write(json.dumps({key: about[key] for key in ("from_step", "ranks", "versions", "manifest")}) + "\n")


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


if __name__ == "__main__":
    entry()
