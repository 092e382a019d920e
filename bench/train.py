"""`main.py` against a bare PyTorch loop on the same model and batches, and the cost of each sequence length.

    python bench/train.py [--steps 40] [--hidden 256] [--layers 6] [--json]

Builds shards of 1 024-token blocks from the bundled sample into a temporary folder. Trainer and bare loop take turns
within one process; times are medians over steps, the first ten of each run left out. Model flops utilisation is that of
the best of ten timed matrix products (8192³ in bf16 on a GPU, 2048³ in fp32 on a CPU).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):
    sys.path[0] = str(ROOT)

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
    with tempfile.TemporaryDirectory() as folder:
        build_shards(Path(folder))
        results: dict[str, Any] = {}
        trainer, bare, wait = [], [], []
        for turn in range(args.rounds):
            settings = make_settings(Path(folder), args, 256, f"turn{turn}")
            times, waited = run_trainer(settings)
            trainer += times
            wait += waited
            bare += run_bare(settings)
        ours, theirs = statistics.median(trainer), statistics.median(bare)
        results["main.py steps/s"] = 1 / ours
        results["bare loop steps/s"] = 1 / theirs
        results["main.py slower by"] = ours / theirs - 1
        results["data-wait share"] = statistics.mean(wait)
        for seq_len in (256, 512, 1024):
            settings = make_settings(Path(folder), args, seq_len, f"length{seq_len}")
            step = statistics.median(run_trainer(settings)[0])
            results[f"steps/s at {seq_len}"] = 1 / step
            results[f"tokens/s at {seq_len}"] = args.sequences * seq_len / step
        results.update(utilisation(results, settings))
    if args.json:
        print(json.dumps(results, indent=2))
    else:
        for name, value in results.items():
            text = f"{value:.2%}" if "share" in name or "by" in name or "utilisation" in name else f"{value:,.4g}"
            print(f"{name:32} {text}")


def build_shards(folder: Path) -> None:
    """Tokenizer and shards of 1 024-token blocks from the sample."""
    from convert import build_shards as builder
    from convert import train_tokenizer

    config = [
        "yamls/demo/shards.yaml",
        f"tokenizer.path={folder}/tokenizer",
        f"output={folder}/shards",
        "block_len=1024",
    ]
    train_tokenizer.main(config)
    builder.main(config)


def make_settings(folder: Path, args: argparse.Namespace, seq_len: int, name: str) -> Any:
    from train.settings import read_settings

    return read_settings(
        Path("yamls/demo/base.yaml"),
        [
            f"run_name={name}",
            f"shards={folder}/shards",
            f"cache={folder}/cache",
            f"save_folder={folder}/{name}",
            f"phases=[{{name: bench, steps: {args.steps}, proportions: {{en_cosmopedia: 0.5, it_culturax: 0.5}}}}]",
            f"curriculum.stages=[{{from_step: 0, seq_len: {seq_len}}}]",
            f"global_train_batch_size={args.sequences}",
            "device_train_microbatch_tokens=16384",
            "scheduler={name: constant, warmup_steps: 0, decay_steps: 0}",
            f"model={{model_type: llama, hidden_size: {args.hidden}, intermediate_size: {args.hidden * 3}, "
            f"num_hidden_layers: {args.layers}, num_attention_heads: {args.hidden // 64}, "
            "max_position_embeddings: 1024}",
            "save_interval=0",
            "eval.interval=0",
            "generate.interval=0",
        ],
    )


def run_trainer(settings: Any) -> tuple[list[float], list[float]]:
    """Seconds of each step after the warm-up under Composer, and the share of each that waited for data."""
    from composer import Callback

    from train.main import build_trainer
    from train.run_store import run_folder
    from train.settings import plan_of
    from train.shards import open_shards

    class Clock(Callback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def batch_start(self, state: Any, logger: Any) -> None:
            self.ends.append(time.perf_counter())

    shards = open_shards(settings.shards, settings.cache)
    plan = plan_of(settings, shards.block_len)
    from train.checkpoints import duration

    folder = run_folder(settings.run_name, settings.save_folder)
    folder.mkdir(parents=True, exist_ok=True)
    until = duration(None, plan.steps)
    trainer = build_trainer(settings, Path("bench"), shards, plan, folder, until, None)
    clock = Clock()
    trainer.state.callbacks.insert(0, clock)
    trainer.fit()
    trainer.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data/wait_share"] for line in lines if line["step"] >= WARM_UP and "data/wait_share" in line]
    return [b - a for a, b in zip(clock.ends[WARM_UP:], clock.ends[WARM_UP + 1 :], strict=False)], waits


def run_bare(settings: Any) -> list[float]:
    """Seconds of each step after the warm-up in the loop one would write by hand, on the same batches."""
    import torch
    from composer.optim import DecoupledAdamW

    from train.collate import Marks, collate, view_sequences
    from train.mixture import MixtureDataset
    from train.model import build_model
    from train.settings import plan_of
    from train.shards import open_shards

    shards = open_shards(settings.shards, settings.cache)
    plan = plan_of(settings, shards.block_len)
    tokenizer = shards.tokenizer
    torch.manual_seed(settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(settings, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id).to(device)
    options = settings.optimizer
    optimizer = DecoupledAdamW(model.parameters(), lr=options.lr, betas=tuple(options.betas), eps=options.eps)
    dataset = MixtureDataset(root=settings.shards, cache=settings.cache, plan=plan, seed=settings.seed)
    marks = Marks(tokenizer.eos_id, tokenizer.pad_id, settings.train_on, settings.document_mask)
    ends = []
    for record in dataset:
        ends.append(time.perf_counter())
        views = view_sequences(collate(record, frozenset()), marks)
        batch = {name: tensor.to(device) for name, tensor in views.items()}
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model.loss(model(batch), batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
        optimizer.step()
        loss.item()
    return [b - a for a, b in zip(ends[WARM_UP:], ends[WARM_UP + 1 :], strict=False)]


def utilisation(results: dict[str, Any], settings: Any) -> dict[str, float]:
    """Model flops a second at 1 024 tokens over the best of ten timed matrix products."""
    import torch

    from train.model import build_model
    from train.shards import open_shards

    on_gpu = torch.cuda.is_available()
    side, kind = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    a = torch.randn(side, side, device="cuda" if on_gpu else "cpu", dtype=kind)
    times = []
    for _ in range(13):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    ceiling = 2 * side**3 / min(times[3:])
    tokenizer = open_shards(settings.shards, settings.cache).tokenizer
    model = build_model(settings, tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id)
    flops = model.flops_per_batch({"input_ids": torch.empty(1, 1024)}) / 1024
    return {
        "matmul ceiling TFLOP/s": ceiling / 1e12,
        "model flops utilisation": results["tokens/s at 1024"] * flops / ceiling,
    }


if __name__ == "__main__":
    main()
