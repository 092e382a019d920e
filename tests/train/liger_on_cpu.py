"""Models with Liger's kernels against the same without, in Triton's interpreter (`TRITON_INTERPRET=1`) or on a GPU.

    python -m tests.train.liger_on_cpu MODEL_TYPE …

Prints each model type whose logits and gradients are the same. The interpreter of Triton 3.3 lacks four things that
these kernels need: a device, floats as arguments, `rsqrt`, and what an autotuner times.
"""

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from chimera.train.settings import TrainSettings
from chimera.train.step.model import CausalLM, build_model
from chimera.train.step.model_checks import check_document_mask


def without_a_gpu() -> None:
    import numpy as np
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, interpreter

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 80, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Callable[..., float]:
            return lambda run, **_: (run(), 1.0)[1]

    convert = interpreter._implicit_cvt

    def with_floats(value: Any) -> Any:
        if not isinstance(value, float):
            return convert(value)
        return tl.tensor(interpreter.TensorHandle(np.array([value], dtype=np.float32), tl.float32), tl.float32)

    driver.set_active(Driver())
    interpreter._implicit_cvt = with_floats
    norm = importlib.import_module("liger_kernel.ops.rms_norm")  # which asks for the driver
    norm.rsqrt = lambda value: 1.0 / tl.sqrt(value)
    torch.cuda.is_available = lambda: True


def check(model_type: str, device: str) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"model_type": model_type, "num_key_value_heads": 2, "max_position_embeddings": 64, **sizes}
    torch.manual_seed(0)
    plain, fused = (
        build_model(TrainSettings(model=options, liger=liger), 100, 0, 1).to(device) for liger in (False, True)
    )
    fused.load_state_dict(plain.state_dict())
    assert ligers(fused) > 3 * 2 > ligers(plain) == 0  # norms and an MLP in each layer, and the last norm
    ids = torch.randint(2, 100, (3, 16), generator=torch.Generator().manual_seed(1)).to(device)
    places = torch.stack([torch.cat([torch.arange(n), torch.arange(16 - n)]) for n in (16, 5, 11)]).to(device)
    batch = {"input_ids": ids, "labels": ids, "position_ids": places}
    logits = [model(batch) for model in (plain, fused)]
    assert torch.allclose(logits[1], logits[0], atol=1e-5)
    for model, found in zip((plain, fused), logits, strict=True):
        model.loss(found, batch).backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)
    check_document_mask(fused, 16)


def ligers(model: CausalLM) -> int:
    return sum("liger" in part.forward.__module__ for part in model.modules())


if __name__ == "__main__":
    on = "cuda" if torch.cuda.is_available() else "cpu"
    if on == "cpu":
        without_a_gpu()
    for name in sys.argv[1:]:
        check(name, on)
        print(name)
