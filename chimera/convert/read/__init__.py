"""A source to rows, from any position: one file a format, one registry of them (`readers.py`)."""
