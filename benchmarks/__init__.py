"""What the trainer costs, in time and in memory; each file says how it is run. Nothing here is installed."""
