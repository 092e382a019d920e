"""What this machine computes with: versions, device, and the best of ten timed matrix products.

`python bench/device.py` prints it as JSON; it needs torch alone.
"""

import json
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "mosaicml", "mosaicml-streaming", "triton", "liger-kernel")


def matmul_ceiling() -> float:
    """FLOP/s of the best of ten products of random square matrices: 8192³ in bf16 on a GPU, 2048³ in fp32 on a CPU."""
    import torch

    on_gpu = torch.cuda.is_available()
    side, kind = (8192, torch.bfloat16) if on_gpu else (2048, torch.float32)
    a, b = (torch.randn(side, side, device="cuda" if on_gpu else "cpu", dtype=kind) for _ in range(2))
    times = []
    for _ in range(13):
        if on_gpu:
            torch.cuda.synchronize()
        began = time.perf_counter()
        torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return 2 * side**3 / min(times[3:])


def describe() -> dict[str, Any]:
    """Versions, device, memory in bytes (None on a CPU) and the ceiling in FLOP/s."""
    import torch

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "none"
    on_gpu = torch.cuda.is_available()
    return {
        "versions": versions,
        "on_gpu": on_gpu,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {len(os.sched_getaffinity(0))} cores",
        "cuda": torch.version.cuda,
        "memory": torch.cuda.get_device_properties(0).total_memory if on_gpu else None,
        "matmul_flops": matmul_ceiling(),
    }


if __name__ == "__main__":
    json.dump(describe(), sys.stdout)
