"""Weights: which exist, which are current, how they are named by their content, and where they come from."""

from app.weights.digest import DigestMemo, FileDigest, digest_files, files_that_matter, weights_digest
from app.weights.durable import write_whole
from app.weights.manifest import BrokenWeights, Manifest, UnknownWeights
from app.weights.pull import DEFAULT_MODEL, pull_default
from app.weights.registry import Moved, Problem, Registry, Row
from app.weights.resolve import require_weights, resolve, sampling_defaults

__all__ = [
    "DEFAULT_MODEL",
    "BrokenWeights",
    "DigestMemo",
    "FileDigest",
    "Manifest",
    "Moved",
    "Problem",
    "Registry",
    "Row",
    "UnknownWeights",
    "digest_files",
    "files_that_matter",
    "pull_default",
    "require_weights",
    "resolve",
    "sampling_defaults",
    "weights_digest",
    "write_whole",
]
