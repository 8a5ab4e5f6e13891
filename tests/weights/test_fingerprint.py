"""Whether an engine says what its weights said: the comparison, its tolerances, and where it is remembered."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.domain import Weights
from app.weights import PROBES, Mismatch, Witness, compare, fingerprint_of, is_comparable

WEIGHTS = Weights("bot", "", "a" * 64, "b" * 64, {})


def said(shift: float = 0.0, *, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    prompts = {probe.name: ("prompt", [-0.5 * number + shift for number in range(1, 9)]) for probe in PROBES}
    return fingerprint_of(prompts, dtype=dtype, **changes)


def test_the_same_weights_are_the_same() -> None:
    assert compare(said(), said()) == 0
    assert compare(said(), json.loads(json.dumps(said()))) == 0, "as a manifest gives it back"


@pytest.mark.parametrize(
    ("shift", "dtypes", "is_same"),
    [
        (0.002, ("float32", "float32"), True),
        (0.02, ("float32", "float32"), False),
        (0.02, ("float32", "bfloat16"), True),
        (0.02, ("bfloat16", "bfloat16"), True),
        (0.12, ("bfloat16", "bfloat16"), False),
        (0.3, ("bfloat16", "an unknown one"), False),
    ],
)
def test_how_far_apart_is_too_far_depends_on_the_dtype(shift: float, dtypes: tuple[str, str], is_same: bool) -> None:
    recorded, measured = said(dtype=dtypes[0]), said(shift, dtype=dtypes[1])
    if is_same:
        assert compare(recorded, measured) == pytest.approx(shift)
    else:
        with pytest.raises(Mismatch, match="apart on average"):
            compare(recorded, measured)


def test_one_probe_or_one_token_that_is_off_is_enough() -> None:
    for change in (lambda values: [value + 0.02 for value in values], lambda values: [*values[:-1], values[-1] + 0.06]):
        measured = said()
        measured["probes"]["numbers"]["logprobs"] = change(measured["probes"]["numbers"]["logprobs"])
        with pytest.raises(Mismatch, match="'numbers'"):
            compare(said(), measured)


def test_another_tokenizer_is_a_mismatch_and_another_template_is_not() -> None:
    """Some templates print today's date, so tomorrow's prompt is another one; the digest covers the template."""
    measured = said()
    measured["probes"]["greeting"] = {"prompt": "another", "logprobs": [-9.0]}
    assert compare(said(), measured) == 0
    measured["probes"]["prose"]["prompt"] = "another"
    with pytest.raises(Mismatch, match="tokenizer"):
        compare(said(), measured)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_compute_nonsense_have_no_fingerprint(value: float) -> None:
    with pytest.raises(Mismatch, match="finite"):
        fingerprint_of({"prose": ("prompt", [-1.0, value])}, dtype="float32")


def test_what_cannot_be_compared_is_not() -> None:
    assert not is_comparable({}, said())
    assert not is_comparable(said(), said(quantization="fp8"))
    newer = deepcopy(said())
    newer["schema"] = 99
    assert not is_comparable(newer, said())


def test_published_weights_must_say_what_they_said(tmp_path: Path) -> None:
    witness = Witness(tmp_path / "fingerprints")
    witness.check(replace(WEIGHTS, fingerprint=said()), said(0.001))
    with pytest.raises(Mismatch):
        witness.check(replace(WEIGHTS, fingerprint=said()), said(1.0))
    assert not (tmp_path / "fingerprints").exists(), "the manifest is the memory"


def test_weights_that_nobody_vouched_for_are_believed_once(tmp_path: Path) -> None:
    Witness(tmp_path).check(WEIGHTS, said())
    Witness(tmp_path).check(WEIGHTS, said())
    with pytest.raises(Mismatch):
        Witness(tmp_path).check(WEIGHTS, said(1.0))
    Witness(tmp_path).check(replace(WEIGHTS, digest="c" * 64), said(1.0))
    Witness(tmp_path).check(replace(WEIGHTS, settings_digest="c" * 64), said(1.0))
    for file in tmp_path.iterdir():
        file.write_text("[")
    Witness(tmp_path).check(WEIGHTS, said(1.0))


def test_a_model_that_generates_nothing_is_served_without_a_fingerprint(tmp_path: Path) -> None:
    Witness(tmp_path).check(WEIGHTS, {"schema": 1, "dtype": "float32", "probes": {}})
    assert list(tmp_path.iterdir()) == []
