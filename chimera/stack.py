"""The pinned stack: refuse to start on versions whose behaviour the project was not proven on.

`numpy>=2.2` makes installers fall back to streaming 0.10 without a word, so the check is by name at start-up.
"""

from importlib.metadata import PackageNotFoundError, version

from chimera.cli import UserError

PINNED = {"mosaicml-streaming": "0.13.0", "mosaicml": "0.32.1"}


def check_stack() -> None:
    """Raise `UserError` unless streaming and Composer are installed in the pinned versions."""
    for package, wanted in PINNED.items():
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "none"
        if found != wanted:
            raise UserError(
                f"{package} {wanted} is needed, found {found}: install with "
                "`pip install -c constraints.txt -e .` (numpy must stay below 2.2)"
            )
