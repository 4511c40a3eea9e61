"""Where it all meets."""
