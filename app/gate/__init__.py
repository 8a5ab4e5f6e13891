"""The gate: may this caller enter."""
