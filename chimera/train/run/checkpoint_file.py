"""A checkpoint's file, read without trusting it: tensors and plain values alone are unpickled."""

import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import torch
from numpy._core.multiarray import _reconstruct
from torch.torch_version import TorchVersion

from chimera.cli import UserError
from chimera.text import one_line


def read_checkpoint(path: Path, lazy: bool = False) -> dict[str, Any]:
    """The `state` of one of our checkpoints, on the CPU; only tensors and plain values are unpickled.

    `lazy`: a tensor's bytes are read where they are used, so the file must stay as it is until then.
    """
    # What Composer keeps beside the tensors: random states, durations, torch's version.
    plain: list[Any] = [_reconstruct, numpy.ndarray, numpy.dtype, numpy.dtypes.UInt32DType, timedelta, TorchVersion]
    try:
        with torch.serialization.safe_globals(plain):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=lazy)["state"]
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except MemoryError:
        raise
    except pickle.UnpicklingError:  # whose text advises to load it without the check
        raise UserError(
            f"{path} is not a checkpoint that can be read: it is damaged, or holds more than tensors and plain values"
        ) from None
    except Exception as error:  # of many kinds, by what the file holds
        raise UserError(
            f"{path} is not a checkpoint that can be read: {one_line(error)[:200] or type(error).__name__}"
        ) from None
    callbacks = dict(state.get("callbacks") or {}) if isinstance(state, dict) else {}
    if "About" not in callbacks:
        raise UserError(f"{path} was not written by train/main.py: it lacks the model's description")
    return {**state, "callbacks": callbacks}
