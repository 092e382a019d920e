"""A build: its plan, its parts and what of them is done, where they run, where they end up."""
