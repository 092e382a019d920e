"""A checkpoint's loss on the eval splits: `python train/evaluate.py CHECKPOINT [CONFIG] [key=value ...]`.

The page of this command is chimera/commands/evaluate.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.commands.evaluate import entry

if __name__ == "__main__":
    entry()
