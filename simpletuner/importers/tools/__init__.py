"""One file for each trainer whose settings can be read."""
