"""What a GPU would run, on a CPU where there is none.

bf16 under autocast, flex attention uncompiled, Liger's kernels in Triton's interpreter: the project's own code is the
same. What these tests cannot show is a GPU's kernels, speed and memory.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer.core import Precision

from chimera.commands.train import main
from chimera.train.step import model
from chimera.train.step.model import build_model
from tests.train.conftest import ROOT, flex_uncompiled, steps_of, weights_of

PEAK = 10**12  # flops a second of the GPU that is played
Overrides = Callable[..., list[str]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Composer's CPU passes for a GPU of `PEAK` flops, and casts as one."""
    if torch.cuda.is_available():
        return

    def context(precision: Precision, *_: Any) -> Any:
        return torch.autocast("cpu", torch.bfloat16, enabled=precision == Precision.AMP_BF16)

    monkeypatch.setattr("composer.devices.DeviceCPU.name", "gpu")
    monkeypatch.setattr("composer.trainer.trainer._validate_precision", lambda *_: None)
    for place in ("composer.trainer.trainer", "chimera.train.run.curriculum", "chimera.train.run.evaluate"):
        monkeypatch.setattr(f"{place}.get_precision_context", context)
    monkeypatch.setattr("composer.callbacks.speed_monitor.get_gpu_flops_available", lambda _: PEAK)


@pytest.mark.usefixtures("gpu")
def test_bf16_trains_on_the_same_batches_and_resumes_bit_by_bit(overrides: Overrides, tmp_path: Path) -> None:
    small = "device_train_microbatch_tokens=512"
    main(overrides("fp32", small, "precision=fp32"))
    main(overrides("bf16", small))  # `auto` is bf16 here
    main(overrides("again", small, "max_duration=17ba"))
    main(overrides("again", small))
    precise, rounded = steps_of(tmp_path / "fp32"), steps_of(tmp_path / "bf16")
    assert [step["digest"] for step in rounded] == [step["digest"] for step in precise]
    losses = [(ours["loss"], theirs["loss"]) for ours, theirs in zip(rounded, precise, strict=True)]
    assert all(ours == pytest.approx(theirs, rel=0.005) for ours, theirs in losses)
    assert any(ours != theirs for ours, theirs in losses)
    whole, again = weights_of(tmp_path / "bf16", 30), weights_of(tmp_path / "again", 30)
    assert all(value.dtype == torch.float32 for value in whole.values())
    assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.usefixtures("gpu")
def test_flops_utilization_is_logged(overrides: Overrides, tmp_path: Path) -> None:
    main(overrides("run", "device_train_microbatch_tokens=512", "max_duration=14ba"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "throughput/device/mfu" in line]
    assert logged
    weights = weights_of(tmp_path / "run", 14)  # its head is its embedding
    parameters = sum(value.numel() for name, value in weights.items() if "lm_head" not in name)
    for line in logged:
        flops = line["throughput/device/flops_per_sec"]
        assert line["throughput/device/mfu"] == pytest.approx(flops / PEAK)
        a_token = flops / line["throughput/device/tokens_per_sec"]
        assert 6 * parameters < a_token < 6 * parameters + 12 * 2 * 32 * 128


@pytest.fixture
def built_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`build_model` believes in a GPU; nothing else does."""

    def build(*arguments: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return build_model(*arguments)

    monkeypatch.setattr(model, "build_model", build)


@pytest.mark.usefixtures("built_for_a_gpu")
def test_flex_attention_trains_as_sdpa_does(overrides: Overrides, tmp_path: Path) -> None:
    plain = ["model.attention_dropout=0.0", "max_duration=10ba"]
    main(overrides("sdpa", *plain))
    with contextlib.nullcontext() if torch.cuda.is_available() else flex_uncompiled():
        main(overrides("flex", *plain, "attn_implementation=flex_attention"))
    for ours, theirs in zip(steps_of(tmp_path / "flex"), steps_of(tmp_path / "sdpa"), strict=True):
        assert ours["digest"] == theirs["digest"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5), ours["step"]


@pytest.mark.usefixtures("gpu", "built_for_a_gpu")
def test_flex_attention_trains_in_bf16(overrides: Overrides, tmp_path: Path) -> None:
    """Under autocast the rotation makes queries and keys float32, and values are bfloat16."""
    plain = ["model.attention_dropout=0.0", "max_duration=10ba", "device_train_microbatch_tokens=512"]
    main(overrides("sdpa", *plain))
    with contextlib.nullcontext() if torch.cuda.is_available() else flex_uncompiled():
        main(overrides("flex", *plain, "attn_implementation=flex_attention"))
    for ours, theirs in zip(steps_of(tmp_path / "flex"), steps_of(tmp_path / "sdpa"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.005), ours["step"]


def test_ligers_kernels_give_the_same_logits_and_gradients() -> None:
    pytest.importorskip("liger_kernel")
    run = [sys.executable, "-m", "tests.train.liger_on_cpu", "llama", "qwen2"]
    interpreted = {**os.environ, "TRITON_INTERPRET": "0" if torch.cuda.is_available() else "1"}
    found = subprocess.run(run, cwd=ROOT, env=interpreted, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["llama", "qwen2"]
