"""Pretrain a causal language model from shards: `composer train/main.py CONFIG [key=value ...]`.

The page of this command is chimera/commands/train.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.commands.train import entry

if __name__ == "__main__":
    entry()
