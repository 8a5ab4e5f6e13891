"""May these weights be published? A pure comparison of what was measured with what was asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Losses:
    """Mean negative log-likelihood of the held-out answers, per token."""

    base: float
    tuned: float

    @property
    def perplexities(self) -> tuple[float, float]:
        return _perplexity(self.base), _perplexity(self.tuned)


def reasons_against(
    losses: Losses | None,
    pass_rates: Mapping[str, float],
    *,
    max_loss_ratio: float,
    min_pass: Mapping[str, float],
) -> tuple[str, ...]:
    """Empty: nothing is against it. Without held-out rows there is no loss to compare."""
    found = []
    if losses is not None and not losses.tuned <= losses.base * max_loss_ratio:  # NaN is against it too
        found.append(
            f"held-out loss {losses.tuned:.3f} is above {max_loss_ratio:g} x the base's {losses.base:.3f} "
            "(max_loss_ratio)"
        )
    for group, least in min_pass.items():
        if group not in pass_rates:
            found.append(f"min_pass names the group {group!r}, and no question is in it")
        elif pass_rates[group] < least:
            found.append(f"{pass_rates[group]:.0%} of {group!r} passed, {least:.0%} are asked for (min_pass)")
    return tuple(found)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
