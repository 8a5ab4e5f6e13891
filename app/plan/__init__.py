"""What a model needs of a machine, on paper: memory, tokens/s, cost; and how far that is from what was measured."""
