"""HTTP in and out, and nothing else: bodies, headers, statuses, streams, and the shape of errors."""
