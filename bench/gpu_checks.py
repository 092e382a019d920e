"""The checks of `bench/gpu.py`: each trains with the project's own command and returns figures, or raises."""

import importlib.util
import shutil
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.gpu_runs import BLOCK_LEN, LENGTHS, Failed, Json, Runs, Sizes, Skipped, Trained

Figures = dict[str, Any]

FIRST_LOSS, ANY_LOSS = 2e-3, 2e-2  # how far losses may differ, relative: by rounding alone, and by what grows of it
GRAPHS = 4  # that torch.compile may make: one of fixed length, one of any length, each perhaps in two pieces


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int) -> Json:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": BLOCK_LEN,
        "tie_word_embeddings": True,
    }


FULL = Sizes(
    vocabulary=32_043,  # the recipe's
    small=_llama(512, 1536, 4, 8, 4),
    recipe=_llama(576, 1536, 32, 9, 3),  # yamls/base.yaml
    large=_llama(2048, 8192, 16, 16, 4),
    steps=12,
    warm_up=4,
    sequences=16,
    large_sequences=64,
    large_tokens=8192,
    auto_sequences=1024,
)
SMALLEST = Sizes(
    vocabulary=500,
    small=_llama(64, 128, 1, 2, 1),
    recipe=_llama(64, 128, 1, 2, 1),
    large=_llama(128, 256, 1, 2, 1),
    steps=4,
    warm_up=1,
    sequences=4,
    large_sequences=2,
    large_tokens=2048,
    auto_sequences=4,
)


def ceiling(runs: Runs) -> Figures:
    """The best of ten matrix products."""
    return {"TFLOP/s": runs.device["matmul_flops"] / 1e12}


def resume(runs: Runs) -> Figures:
    """All three lengths, killed with SIGKILL in the second and resumed: every digest is the plan's."""
    check_digests(runs.plain)
    again = killed_and_resumed(runs, "resumed")
    first, last = (mean_loss(runs.plain, part) for part in (slice(0, 3), slice(-3, None)))
    if not last < first:
        raise Failed(f"the loss does not fall: {first:.3f} at the beginning, {last:.3f} at the end")
    return {"steps": len(again.steps), "loss": f"{first:.3f} to {last:.3f}", **compared(again, runs.plain)}


def fsdp(runs: Runs) -> Figures:
    """FSDP on one rank, killed and resumed, against the plain run."""
    needs(gpu=runs.on_gpu)
    options = "parallelism={fsdp: {sharding_strategy: FULL_SHARD}}"
    return compared(killed_and_resumed(runs, "fsdp", options), runs.plain)


def compiled(runs: Runs) -> Figures:
    """`compile: true`: the losses of the plain run, and no graph more at the third length."""
    needs(gpu=None, compiler=True)
    run = runs.train("compile", runs.sizes.small, "compile=true")
    made = {line["step"]: int(line[key]) for line in run.metrics if (key := "curriculum/compiled_graphs") in line}
    if not made:
        raise Failed("nothing was compiled")
    step, graphs = list(made.items())[-1]
    if graphs > GRAPHS or step > 2 * runs.sizes.steps:
        raise Failed(f"{graphs} graphs, the last at step {step}: at most {GRAPHS}, none past the second length")
    return {"graphs": graphs, "last at step": step, **compared(run, runs.plain)}


def flex(runs: Runs) -> Figures:
    """`attn_implementation: flex_attention`, which transformers compiles by itself."""
    needs(gpu=runs.on_gpu, compiler=True)
    run = runs.train("flex", runs.sizes.small, "attn_implementation=flex_attention")
    graphs = run.last("curriculum/compiled_graphs")
    if not graphs:
        raise Failed("flex attention was not compiled")
    return {"graphs": int(graphs), **compared(run, runs.plain)}


def liger(runs: Runs) -> Figures:
    """`liger: true`: the losses of the plain run."""
    needs(gpu=runs.on_gpu, compiler=True, modules=("liger_kernel",))
    return compared(runs.train("liger", runs.sizes.small, "liger=true"), runs.plain)


def auto(runs: Runs) -> Figures:
    """`device_train_microbatch_tokens: auto` on more sequences than fit: Composer goes down to what does."""
    needs(gpu=runs.on_gpu)
    wanted = runs.sizes.auto_sequences
    run = runs.train("auto", runs.sizes.recipe, lengths=(1024,), steps=3, sequences=wanted, microbatch_tokens="auto")
    check_digests(run)
    found = run.last("trainer/device_train_microbatch_size")
    if found is None:
        raise Failed("auto: no microbatch was logged")
    return {"sequences a step": wanted, "found": found, "peak GB": run.measured["peak_bytes"] / 1e9}


def speed(model: str, *options: str) -> Callable[[Runs], Figures]:
    """A check that times a model: tokens a second at each length, utilization, waiting and memory."""

    def check(runs: Runs) -> Figures:
        if options:
            modules = ("liger_kernel",) if "liger=true" in options else ()
            needs(gpu=runs.on_gpu, compiler=True, modules=modules)
        sizes, name = runs.sizes, "-".join(["speed", model, *(option.split("=")[0] for option in options)])
        lengths: tuple[int, ...] = LENGTHS
        sequences, tokens = sizes.sequences, sizes.sequences * BLOCK_LEN
        if model == "large":
            lengths, sequences, tokens = (BLOCK_LEN,), sizes.large_sequences, sizes.large_tokens
        run = runs.train(
            name,
            getattr(sizes, model),
            *options,
            lengths=lengths,
            sequences=sequences,
            microbatch_tokens=tokens,
        )
        speeds = {length: sequences * length / run.seconds(length, sizes.warm_up) for length in lengths}
        flops = speeds[BLOCK_LEN] * run.measured["flops_per_token"][BLOCK_LEN]
        return {
            "parameters M": run.measured["parameters"] / 1e6,
            **{f"tokens/s at {length}": round(found) for length, found in speeds.items()},
            f"MFU % at {BLOCK_LEN}": 100 * flops / max(runs.device["matmul_flops"], run.measured["matmul_flops"]),
            "waits for data %": 100 * run.wait_share(sizes.warm_up),
            "peak GB": run.measured["peak_bytes"] / 1e9,
        }

    check.__doc__ = f"The {model} model, {' '.join(options) or 'as it is'}."
    return check


# In the order they run; each with the minutes it may take.
CHECKS: dict[str, tuple[Callable[[Runs], Figures], float]] = {
    "matmul ceiling": (ceiling, 1),
    "kill and resume": (resume, 3),
    "speed large": (speed("large"), 2),
    "speed large compile": (speed("large", "compile=true"), 3),
    "speed large compile liger": (speed("large", "compile=true", "liger=true"), 3),
    "speed recipe": (speed("recipe"), 2),
    "speed recipe compile": (speed("recipe", "compile=true"), 3),
    "compile": (compiled, 4),
    "flex attention": (flex, 3),
    "liger": (liger, 2),
    "fsdp on one rank": (fsdp, 2),
    "auto microbatch": (auto, 3),
}


def named(name: str, runs: Runs) -> Figures:
    """The figures of one of `CHECKS`; raises `Skipped` or `Failed`, the latter past its minutes too."""
    check, minutes = CHECKS[name]
    if not runs.on_gpu:
        minutes *= 5  # a CPU may be busy with others' work
    runs.until = time.monotonic() + 60 * (minutes if runs.limit is None else runs.limit)
    return check(runs)


def needs(gpu: bool | None, compiler: bool = False, modules: tuple[str, ...] = ()) -> None:
    """Raise `Skipped`, naming what is missing; `gpu`: whether one is there, None where none is needed."""
    if gpu is False:
        raise Skipped("a GPU")
    if compiler and not any(map(shutil.which, ("c++", "g++", "clang++") if gpu is None else ("cc", "gcc", "clang"))):
        raise Skipped("a C compiler")
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise Skipped(module)


def missing_modules() -> list[str]:
    """What of the train wing's own needs this Python lacks."""
    wanted = ("torch", "transformers", "tokenizers", "composer", "streaming", "omegaconf", "torchvision", "xxhash")
    return [module for module in wanted if importlib.util.find_spec(module) is None]


def killed_and_resumed(runs: Runs, name: str, *options: str) -> Trained:
    """Kill a run of the small model in its second length, after a checkpoint, and start it again."""
    steps = runs.sizes.steps
    kill, every = steps + steps // 2, max(2, steps // 3)
    runs.train(name, runs.sizes.small, f"save_interval={every}", *options, kill_after=kill)
    run = runs.train(name, runs.sizes.small, f"save_interval={every}", *options)
    first, due = min(run.measured["seconds"]), (kill + 1) // every * every
    if first != due:
        raise Failed(f"{name}: killed after step {kill}, it went on at step {first}, not at {due}")
    check_digests(run)
    return run


def check_digests(run: Trained) -> None:
    """Raise `Failed` unless every step's digest is the one computed from plan and shards."""
    from chimera.train.history.digests import compare_digests
    from chimera.train.history.run_files import read_run

    found = read_run(run.folder)
    differing, unchecked = compare_digests(found)
    if unchecked is not None or differing or len(found.steps) != found.plan.steps:
        raise Failed(
            f"{run.folder.name}: {len(found.steps)} of {found.plan.steps} steps, {len(differing)} with another digest"
            + (f": {unchecked}" if unchecked else "")
        )


def compared(run: Trained, plain: Trained) -> Figures:
    """How far a run's losses are from the plain one's; raises `Failed` where digests or losses are others."""
    if [step["digest"] for step in run.steps] != [step["digest"] for step in plain.steps]:
        raise Failed(f"{run.folder.name}: its steps' digests are not those of the plain run")
    pairs = zip(run.steps, plain.steps, strict=True)
    off = [abs(ours["loss"] - theirs["loss"]) / theirs["loss"] for ours, theirs in pairs]
    if off[0] > FIRST_LOSS or max(off) > ANY_LOSS:
        raise Failed(f"{run.folder.name}: its losses differ by {off[0]:.1e} at step 0, by up to {max(off):.1e} later")
    return {"loss off by": f"{max(off):.1e}", "peak GB": run.measured["peak_bytes"] / 1e9}


def mean_loss(run: Trained, part: slice) -> float:
    losses = [step["loss"] for step in run.steps[part]]
    return sum(losses) / len(losses)


def versions_line(device: Json) -> str:
    """The machine in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in device["versions"].items() if number != "none")
    stands_in = getattr(sys.modules.get("torchvision"), "__doc__", "") or ""
    return f"{device['device']}; {versions}" + ("; without torchvision" if "Stands in" in stands_in else "")
