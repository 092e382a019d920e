"""Trying again at a server that is busy or gone for a while: how often, how long in between, and what is said of it.

Which errors may pass, and their words, are each client's to say; the rest is the same for a hub and for a store.
"""

import time
from collections.abc import Callable

from chimera.cli import say

ATTEMPTS = 4  # where no setting says how many
OPENING = 4  # at most, before anything has answered: the address may be wrong, or the server never there
LONGEST_WAIT = 60.0  # seconds between two attempts, unless the server asks for more


class Retries:
    """Counts the failures in a row of `what`, of which `attempts` are one too many.

    Args:
        what: is tried, as messages name it.
        attempts: at least 1.
        is_transient: whether an error may pass by itself.
        words: an error in one line, without secrets.
    """

    def __init__(
        self,
        what: str,
        attempts: int,
        is_transient: Callable[[Exception], bool],
        words: Callable[[Exception], str],
    ) -> None:
        self.failures = 0  # in a row; whoever gets on sets it back to 0
        self._what, self._attempts, self._is_transient, self._words = what, attempts, is_transient, words

    def wait(self, error: Exception) -> bool:
        """Count a failure, say why, and wait until the next attempt; False, at once, where there is none.

        The waits are of 1 s and each time twice as long, up to `LONGEST_WAIT`, or as long as the server asks for.
        """
        self.failures += 1
        if self.failures >= self._attempts or not self._is_transient(error):
            return False
        asked = _seconds_asked(error)
        seconds = min(LONGEST_WAIT, 2.0 ** (self.failures - 1)) if asked is None else asked
        next_one = f"attempt {self.failures + 1} of {self._attempts} in {seconds:g} s"
        say(f"{self._what}: {self._words(error)}; {next_one}")
        time.sleep(seconds)
        return True


def _seconds_asked(error: BaseException | None) -> float | None:
    """How long the server behind an exception asks to wait (`Retry-After`), where it does."""
    while error is not None:
        for key, value in dict(getattr(getattr(error, "response", None), "headers", None) or {}).items():
            if key.lower() == "retry-after" and str(value).isdigit():
                return float(value)
        error = error.__cause__ or error.__context__
    return None
