"""Checkpoint → Hugging Face folder: `python train/export_hf.py CHECKPOINT OUT`.

The page of this command is chimera/commands/export_hf.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.commands.export_hf import entry

if __name__ == "__main__":
    entry()
