"""Documents to blocks, and blocks to shards."""
