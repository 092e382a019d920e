"""Write docs/commands.md from what each command says with --help: `python docs/commands_page.py`."""

import io
import os
import sys
from contextlib import redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

PAGE = ROOT / "docs/commands.md"
HEAD = """# Commands

What each command says with `--help`. In a checkout they are `python convert/…` and `python train/…`; a wheel installs
the same as console scripts. `CONFIG` is a YAML file, and `key=value` replaces one of its [settings](settings.md).

A mistake that you can fix is one line on stderr, `error: what, where, remedy`, and exit code 2
([troubleshooting](troubleshooting.md)). Ctrl-C and SIGTERM end with 130 where the same command goes on, a preempted
training run with 143. Results are on stdout, all else is on stderr.

This page is made from the commands by `python docs/commands_page.py`.
"""
COMMANDS = {  # module of chimera/commands: in a checkout, from a wheel
    "build_shards": ("python convert/build_shards.py", "chimera-build-shards"),
    "verify_shards": ("python convert/verify_shards.py", "chimera-verify-shards"),
    "train_tokenizer": ("python convert/train_tokenizer.py", "chimera-train-tokenizer"),
    "plan": ("python train/plan.py", "chimera-plan"),
    "inspect_batch": ("python train/inspect_batch.py", "chimera-inspect-batch"),
    "train": ("composer train/main.py", "composer -m chimera.train"),
    "report": ("python train/report.py", "chimera-report"),
    "evaluate": ("python train/evaluate.py", "chimera-evaluate"),
    "export_hf": ("python train/export_hf.py", "chimera-export-hf"),
}


def page() -> str:
    """The whole page."""
    lines = [HEAD]
    for module, (checkout, wheel) in COMMANDS.items():
        lines += [f"## {module}\n", f"`{checkout}`, or `{wheel}`\n", "```text", help_of(module), "```\n"]
    return "\n".join(lines).rstrip() + "\n"


def help_of(module: str) -> str:
    """What a command prints with --help, 100 characters wide."""
    said = io.StringIO()
    with patch.dict(os.environ, COLUMNS="100"), redirect_stdout(said), suppress(SystemExit):
        import_module(f"chimera.commands.{module}").main(["--help"])
    return said.getvalue().strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
