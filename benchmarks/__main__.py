"""`python -m benchmarks NAME [--quick] [--rounds N] [--save]`, or `all` of them: LOG.md has what was found."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import Any

from benchmarks.servers import prepare_process

BENCHMARKS = (
    "hits",
    "misses",
    "start",
    "swap",
    "flights",
    "zipf",
    "memory",
    "train",
    "workers",
    "overload",
    "fairness",
    "ray_serve",
)
# Not a figure but a search: asked for by its name alone.
SEARCHES = ("fuzz",)
# Not a figure but a verdict, after a long time: the same; what is not met ends with 1.
TRIALS = ("faults",)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", choices=[*BENCHMARKS, *SEARCHES, *TRIALS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="few and short rounds: shows that it works, not how fast")
    parser.add_argument("--rounds", type=int, help="how often each server has its turn")
    parser.add_argument("--save", action="store_true", help="append the JSON to benchmarks/results/<name>.jsonl")
    parser.add_argument("--minutes", type=float, help="fuzz: of each of its two kinds (1); faults: of all (20)")
    parser.add_argument("--faults", type=int, help="faults: how many (20)")
    parser.add_argument("--seed", type=int, help="faults: which ones, and when")
    given = parser.parse_args()
    prepare_process()
    names = BENCHMARKS if given.what == "all" else (given.what,)
    found = {}
    for name in names:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        more = _more(name, given)
        found[name] = benchmark.run(quick=given.quick, rounds=given.rounds, save=given.save, **more)
    print(json.dumps(found if given.what == "all" else found[given.what]))
    if not all(found[name]["is_met"] for name in TRIALS if name in found):
        sys.exit(1)


def _more(name: str, given: argparse.Namespace) -> dict[str, Any]:
    if name in SEARCHES:
        return {"minutes": given.minutes or 1.0}
    return {"minutes": given.minutes, "faults": given.faults, "seed": given.seed} if name in TRIALS else {}


if __name__ == "__main__":
    main()
