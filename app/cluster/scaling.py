"""How many replicas there should be: by what their engines have to do, whichever door it came by."""

from __future__ import annotations

import math
from typing import Any


def by_calls(context: Any) -> tuple[int, dict[str, Any]]:
    """For Ray's `autoscaling_config.policy`: calls that run or wait, over `target_ongoing_requests`.

    Ray's own policy counts what its proxy passes on; calls at the replicas' own port it never sees. Bounds and delays
    are Ray's. The second value is the policy's memory: none.
    """
    told: dict[Any, float] = context.aggregated_metrics.get("calls", {})
    if not told:  # nobody has told anything yet
        return context.target_num_replicas, {}
    return max(1, math.ceil(sum(told.values()) / context.config.get_target_ongoing_requests())), {}
