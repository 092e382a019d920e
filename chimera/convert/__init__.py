"""Sources to shards."""
