"""`train/main.py` with FSDP on CPU ranks (gloo): torch 2.7's FSDP trains there once it is told so in four places.

It asks CUDA for its device; and when it gathers full states for a checkpoint, it takes `.cpu()` for a copy, which on a
CPU it is not: weights would be views of freed memory, the optimizer's moments views of one buffer.
"""

import contextlib
from typing import Any

import torch
import torch.distributed.fsdp._init_utils as init
import torch.distributed.fsdp._optim_utils as optim
import torch.distributed.fsdp.fully_sharded_data_parallel as fsdp
from torch.distributed.fsdp._flat_param import FlatParamHandle

from chimera.commands import train as main
from chimera.train.step import model_checks


def cpu_handle(state: Any, *_: Any) -> Any:
    state._device_handle = init._FSDPDeviceHandle(torch.device("cpu"))
    return state


unflatten = optim._unflatten_orig_param_states


def copied(info: Any, states: dict[str, Any], name: str, *more: Any) -> None:
    unflatten(info, states, name, *more)
    for found in states.values():
        if name in found:
            found[name] = found[name].clone()


torch.cuda.current_device = lambda: torch.device("cpu")
init._init_device_handle = fsdp._init_device_handle = cpu_handle
FlatParamHandle.to_cpu = lambda *_: contextlib.nullcontext()
optim._unflatten_orig_param_states = copied
model_checks.check_device = lambda *_: None  # it needs GPUs

if __name__ == "__main__":
    main.entry()
