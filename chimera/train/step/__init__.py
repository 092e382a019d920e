"""Blocks to a batch to a loss, and what must hold of a model before the first step."""
