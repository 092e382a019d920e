"""The shards of all roots, and the batches of each step."""
