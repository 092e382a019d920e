"""What `import chimera` gives (docs/api.md), and what its two wings share.

Each name is imported from where it is when first used: `import chimera` alone imports nothing heavy.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chimera.cli import UserError
    from chimera.commands.build_shards import build_shards
    from chimera.commands.verify_shards import verify_shards
    from chimera.train.step.batches import Batch, Batches, batches, plan, read_config

__version__ = "0.2.0"

__all__ = [
    "Batch",
    "Batches",
    "UserError",
    "__version__",
    "batches",
    "build_shards",
    "plan",
    "read_config",
    "verify_shards",
]

_MODULES = {
    **dict.fromkeys(("Batch", "Batches", "batches", "plan", "read_config"), "chimera.train.step.batches"),
    "UserError": "chimera.cli",
    "build_shards": "chimera.commands.build_shards",
    "verify_shards": "chimera.commands.verify_shards",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
