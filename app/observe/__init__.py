"""What an operator sees: metric names (one file) and log lines."""
