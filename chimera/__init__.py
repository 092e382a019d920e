"""What `convert` and `train` share: the version, the command line, the pinned stack."""

__version__ = "0.1.0"
