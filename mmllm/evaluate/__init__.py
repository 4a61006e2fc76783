"""Tasks, metrics and statistics."""
