"""`main.py` against a bare PyTorch loop on the same model and batches, and the cost of each sequence length.

    python bench/train.py [--steps 40] [--hidden 256] [--layers 6] [--json]

Builds shards of 1 024-token blocks from the bundled sample into a temporary folder. Trainer and bare loop take turns
within one process; times are medians over steps, the first ten of each run left out. Model flops utilization is that of
the best of ten timed matrix products (8192³ in bf16 on a GPU, 2048³ in fp32 on a CPU).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from math import inf
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

from chimera.text import percent, table

WARM_UP = 10  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=40, help="steps of each run")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=16, help="a step")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.steps < WARM_UP + 2:
        parser.error(f"--steps {args.steps}: the first {WARM_UP} do not count; give at least {WARM_UP + 2}")
    with tempfile.TemporaryDirectory() as folder:
        build_shards(Path(folder))
        results: dict[str, Any] = {}
        trainer, bare, wait = [], [], []
        for turn in range(args.rounds):
            argv = config(Path(folder), args, 256, f"turn{turn}")
            times, waited, _ = run_trainer(argv)
            trainer += times
            wait += waited
            bare += run_bare(argv)
        ours, theirs = statistics.median(trainer), statistics.median(bare)
        results["main.py steps/s"] = 1 / ours
        results["bare loop steps/s"] = 1 / theirs
        results["main.py slower by"] = ours / theirs - 1
        results["data-wait share"] = statistics.mean(wait)
        for seq_len in (256, 512, 1024):
            times, _, measured = run_trainer(config(Path(folder), args, seq_len, f"length{seq_len}"))
            step = statistics.median(times)
            results[f"steps/s at {seq_len}"] = 1 / step
            results[f"tokens/s at {seq_len}"] = args.sequences * seq_len / step
        ceiling, flops = measured["matmul_flops"], measured["flops_per_token"][1024]  # those of the longest sequences
        results["matmul ceiling TFLOP/s"] = ceiling / 1e12
        results["model flops utilization"] = results["tokens/s at 1024"] * flops / ceiling
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        shares = {name for name in results if "share" in name or "by" in name or "utilization" in name}
        cells = [(name, percent(v) if name in shares else f"{v:,.4g}") for name, v in results.items()]
        print("\n".join(table((), cells)))


def build_shards(folder: Path) -> None:
    """Tokenizer and shards of 1 024-token blocks from the sample."""
    from chimera.commands import build_shards as builder
    from chimera.commands import train_tokenizer

    config = [
        "yamls/demo/shards.yaml",
        f"tokenizer.path={folder}/tokenizer",
        f"output={folder}/shards",
        "block_len=1024",
    ]
    train_tokenizer.main(config)
    builder.main(config)


def config(folder: Path, args: argparse.Namespace, seq_len: int, name: str) -> list[str]:
    """What `train/main.py` is given."""
    model = {
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": args.hidden * 3,
        "num_hidden_layers": args.layers,
        "num_attention_heads": max(1, args.hidden // 64),
        "num_key_value_heads": max(1, min(2, args.hidden // 64)),
        "max_position_embeddings": 1024,
    }
    return [
        str(ROOT / "yamls/demo/base.yaml"),
        f"run_name={name}",
        f"shards={folder}/shards",
        f"cache={folder}/cache",
        f"save_folder={folder}/{name}",
        f"phases=[{{name: bench, steps: {args.steps}, proportions: {{en_cosmopedia: 0.5, it_culturax: 0.5}}}}]",
        f"curriculum.stages=[{{from_step: 0, seq_len: {seq_len}}}]",
        f"global_train_batch_size={args.sequences}",
        "device_train_microbatch_tokens=16384",
        "scheduler={name: constant, warmup_steps: 0, decay_steps: 0}",
        *(f"model.{key}={value}" for key, value in model.items()),
        "save_interval=0",
        "eval.interval=0",
        "generate.interval=0",
    ]


def run_trainer(argv: list[str]) -> tuple[list[float], list[float], dict[str, Any]]:
    """Under `main.py`: seconds of each step after the warm-up, the share of each that waited, what `timed_main` has."""
    from bench.timed_run import timed_main

    measured = timed_main(argv)
    folder = next(word.partition("=")[2] for word in argv if word.startswith("save_folder="))
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    waits = [line["data/wait_share"] for line in lines if line["step"] >= WARM_UP and "data/wait_share" in line]
    times = [seconds for step, seconds in measured["seconds"].items() if step >= WARM_UP]
    return times, waits, measured


def run_bare(argv: list[str]) -> list[float]:
    """Seconds of each step after the warm-up in the loop one would write by hand, on the same batches."""
    import torch
    from composer.optim import DecoupledAdamW

    from chimera.train.data.mixture import MixtureDataset
    from chimera.train.data.roots import open_root
    from chimera.train.order.run_plan import plan_of
    from chimera.train.settings import read_settings
    from chimera.train.step.collate import LabelRules, collate, view_sequences
    from chimera.train.step.model import build_model

    settings = read_settings(Path(argv[0]), argv[1:])
    shards = open_root(settings)
    plan = plan_of(settings, shards.block_len)
    tokenizer = shards.tokenizer
    torch.manual_seed(settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(settings, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id).to(device)
    options = settings.optimizer
    optimizer = DecoupledAdamW(
        model.parameters(), lr=options.lr, betas=(options.betas[0], options.betas[1]), eps=options.eps
    )
    dataset = MixtureDataset(root=settings.shards, cache=settings.cache, plan=plan, seed=settings.seed)
    rules = LabelRules.of(tokenizer, settings)
    ends = []
    for record in dataset:
        ends.append(time.perf_counter())
        views = view_sequences(collate(record, frozenset()), rules)
        batch = {name: tensor.to(device) for name, tensor in views.items()}
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model.loss(model(batch), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm or inf)
        optimizer.step()
        loss.item()
    return [b - a for a, b in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]


if __name__ == "__main__":
    main()
