"""A run under Composer: its stages, checkpoints, ranks, and what it may resume from."""
