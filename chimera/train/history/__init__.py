"""What a run did: its log, digests and report."""
