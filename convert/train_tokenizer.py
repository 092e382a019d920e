"""Entry point: a byte-level BPE tokenizer with ChatML tokens, trained from the sources of a `shards.yaml`.

The page of this command is chimera/commands/train_tokenizer.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.commands.train_tokenizer import entry

if __name__ == "__main__":
    entry()
