"""Weights: which exist, which are current, how they are named by their content, and where they come from."""

from app.weights.digest import DigestMemo, FileDigest, digest_files, files_that_matter, weights_digest
from app.weights.durable import write_whole
from app.weights.exchange import pull_missing, pull_weights, push_weights
from app.weights.fingerprint import PROBES, Mismatch, Probe, compare, fingerprint_of, is_comparable
from app.weights.in_use import InUse
from app.weights.manifest import BrokenWeights, Manifest, UnknownWeights
from app.weights.publish import publish_folder, run_trial
from app.weights.pull import DEFAULT_MODEL, pull_default
from app.weights.registry import Moved, Problem, Registry, Row
from app.weights.resolve import (
    config_folder,
    is_registry_name,
    require_weights,
    resolve,
    resolve_adapter,
    sampling_defaults,
)
from app.weights.shapes import check_shapes
from app.weights.store import Store
from app.weights.witness import Witness

__all__ = [
    "DEFAULT_MODEL",
    "PROBES",
    "BrokenWeights",
    "DigestMemo",
    "FileDigest",
    "InUse",
    "Manifest",
    "Mismatch",
    "Moved",
    "Probe",
    "Problem",
    "Registry",
    "Row",
    "Store",
    "UnknownWeights",
    "Witness",
    "check_shapes",
    "compare",
    "config_folder",
    "digest_files",
    "files_that_matter",
    "fingerprint_of",
    "is_comparable",
    "is_registry_name",
    "publish_folder",
    "pull_default",
    "pull_missing",
    "pull_weights",
    "push_weights",
    "require_weights",
    "resolve",
    "resolve_adapter",
    "run_trial",
    "sampling_defaults",
    "weights_digest",
    "write_whole",
]
