"""Why a source is passed over."""


class CannotOpen(Exception):
    """A source that is not there for us; the next of the list is tried."""
