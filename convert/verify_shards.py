"""Entry point: is every byte and every count of a finished build as the manifest says?

The page of this command is chimera/commands/verify_shards.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.commands.verify_shards import entry

if __name__ == "__main__":
    entry()
