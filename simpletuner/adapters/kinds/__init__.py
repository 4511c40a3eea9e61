"""One file an adapter kind."""
