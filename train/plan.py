"""What a run will see, before it runs: `python train/plan.py [CONFIG] [key=value ...] [--json] [--plot FILE.png]`.

The page of this command is chimera/commands/plan.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.commands.plan import entry

if __name__ == "__main__":
    entry()
