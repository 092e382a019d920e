"""The rooms of the library: imports run one way, the wings do not know each other, and nothing goes in circles."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Each room may import those before it in its wing, and what both wings share.
WINGS = {
    "convert": [["stream_settings"], ["settings"], ["read"], ["encode"], ["pack"], ["build", "verify"]],
    "train": [["settings"], ["order"], ["data"], ["step"], ["run", "history"], ["export"]],
}
COMMANDS = re.compile(r"chimera\.commands\..*|chimera\.train\.__main__")


def imports() -> dict[str, dict[str, bool]]:
    """Of each module of the library: those it imports, and whether at its top."""
    paths = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in (ROOT / "chimera").rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, dict[str, bool]] = {}
    for module, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in set(names) & modules.keys() - {module}:
                there = found.setdefault(module, {})
                there[name] = there.get(name, False) or node in tree.body
    return found


def place(module: str) -> tuple[str, int, str]:
    """The wing of a module (`` for what is shared), how far along its data's way it stands, and its room."""
    parts = module.split(".")
    if len(parts) < 3 or parts[1] not in WINGS:
        return "", 0, ""
    wing = WINGS[parts[1]]
    return parts[1], next(i for i, rooms in enumerate(wing) if parts[2] in rooms), parts[2]


def test_every_folder_of_tests_is_looked_into(pytestconfig: pytest.Config) -> None:
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py")}
    passed_over = pytestconfig.getini("norecursedirs")
    assert len(folders) > 10
    assert not [folder for folder in folders for part in folder.parts for name in passed_over if fnmatch(part, name)]


def test_imports_run_one_way() -> None:
    found = imports()
    assert len(found) > 70
    wrong = []
    for module, others in found.items():
        for other in others if module != "chimera" else ():  # its public names, which it imports when they are used
            if COMMANDS.fullmatch(other) and not COMMANDS.fullmatch(module):
                wrong.append(f"{module} imports the command {other}")
            if COMMANDS.fullmatch(module):
                continue
            (wing, at, room), (other_wing, other_at, other_room) = place(module), place(other)
            if other_wing and (wing != other_wing or other_at > at or (other_at == at and room != other_room)):
                wrong.append(f"{module} imports {other}")
    assert not wrong


# What a module may import when it is needed: extras that need not be installed, and what takes seconds or changes
# another library. All else stands at the top; commands alone import lazily.
WHEN_NEEDED = {
    *("ray", "wandb", "sentencepiece", "liger_kernel", "fastokens", "ocifs", "paramiko", "google", "azure", "botocore"),
    *("datasets", "streaming", "torch", "transformers", "composer", "matplotlib", "huggingface_hub", "pyarrow"),
    *("chimera.convert.read.hub", "chimera.objects_obstore", "chimera.objects_fsspec"),
    *("chimera.train.step.configuration", "chimera.train.step.model_checks", "chimera.train.step.optimizer"),
}


def test_imports_stand_at_the_top() -> None:
    found = []
    for path in sorted((ROOT / "chimera").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef) and not COMMANDS.fullmatch(module):
                for node in ast.walk(function):
                    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                    names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
                    found += [f"{module}: {name}" for name in names if not {name, name.partition(".")[0]} & WHEN_NEEDED]
    assert not found


def test_no_decision_is_made_by_the_wall_clock() -> None:
    """Which may go back. Those that ask it: credentials end at a time of day, a plan holds the day it was made on.

    And two that show it, since when a builder has its lock and how long ago it gave a sign of life.
    """
    asking = re.compile(r"\b(time\.time|time_ns|localtime|gmtime|ctime|(datetime|date)\.(now|utcnow|today))\(")
    found = {
        path.relative_to(ROOT / "chimera").as_posix()
        for path in (ROOT / "chimera").rglob("*.py")
        if asking.search(path.read_text(encoding="utf-8"))
    }
    shown = {"convert/build/work_lock.py", "convert/build/status.py"}
    assert found == {"objects_obstore.py", "convert/encode/probe.py"} | shown


def test_what_is_imported_is_there() -> None:
    """Also in a function, where no test may have come by."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT / "chimera").rglob("*.py")}
    known = {module.removesuffix(".__init__") for module in modules} | {"chimera.convert", "chimera.train"}
    for path in sorted((ROOT / "chimera").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            ours = [name for name in names if name.partition(".")[0] in ("chimera", "convert", "train")]
            assert set(ours) <= known, path


def test_no_module_leads_back_to_itself() -> None:
    graph = {module: set(others) for module, others in imports().items() if module != "chimera"}
    assert len(list(TopologicalSorter(graph).static_order())) > 70  # raises CycleError, which names the circle


def test_every_module_imports_by_itself() -> None:
    """From the last room to the first: no module needs that another was imported before it."""
    heavy = {"chimera.train.__main__"}
    names = sorted(set(imports()) - heavy)
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    done = subprocess.run([sys.executable, "-c", code, *reversed(names)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
