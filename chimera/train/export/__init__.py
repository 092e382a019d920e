"""A checkpoint to a folder that serves what was trained, proven before it is there."""
