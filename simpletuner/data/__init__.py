"""From image folders to batches."""
