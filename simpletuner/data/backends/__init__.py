"""One file a place where data lives."""
