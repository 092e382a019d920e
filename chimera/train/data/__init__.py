"""The shards of a root, and the batches of each step."""
