"""Stands in for torchvision where there is none, as the package of that name that `bench/wheels.py` installs.

Composer, streaming and transformers import names of it that they need for pictures alone. The real one must be of
torch's own build. Here each name is a module if it is in lower case, else an empty class.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class Names:
    """Anything asked of it is its own name."""

    def __getattr__(self, name: str) -> str:
        return name


class Modules(MetaPathFinder, Loader):
    """Finds an empty module for every name below torchvision's."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith("torchvision.") else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        fill(module)


def fill(module: Any) -> None:
    """Let `module` have every attribute that is asked for."""

    def get(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":  # transformers makes a table of its members
            return Names()
        return importlib.import_module(f"{module.__name__}.{name}") if name.islower() else type(name, (), {})

    module.__getattr__ = get


if __name__ == "torchvision":
    sys.meta_path.append(Modules())
    fill(sys.modules[__name__])
