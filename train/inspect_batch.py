"""Exactly what a step sees: `python train/inspect_batch.py CONFIG step=N [key=value ...] [--json] [--decode]`.

The page of this command is chimera/commands/inspect_batch.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.commands.inspect_batch import entry

if __name__ == "__main__":
    entry()
