"""What a run did, from its save folder: a short summary on stdout and `SAVE_FOLDER/report.html`.

The page of this command is chimera/commands/report.py.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from chimera.commands.report import entry

if __name__ == "__main__":
    entry()
