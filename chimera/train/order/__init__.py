"""Phases and stages to steps to blocks: pure, of numpy and the standard library alone."""
