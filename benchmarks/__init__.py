"""Measurements of the whole server against its peers, on this machine, in one run. `python -m benchmarks --help`."""
