"""The offline job that makes weights: data, training, evaluation, trial, publication."""
