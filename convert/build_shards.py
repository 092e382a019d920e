"""Entry point: text sources → MDS shards, as `shards.yaml` says. Killed at any moment, the same command goes on.

The page of this command is chimera/commands/build_shards.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.commands.build_shards import entry

if __name__ == "__main__":
    entry()
