"""Refrain as an application of Ray Serve: whole servers as replicas, placed, scaled and replaced by Ray."""
