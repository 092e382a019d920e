"""The commands, a page each: arguments, one call into the library, what it prints."""
