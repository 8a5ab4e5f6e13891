"""`python -m benchmarks NAME [--quick] [--rounds N] [--save]`, or `all` of them: LOG.md has what was found."""

from __future__ import annotations

import argparse
import importlib
import json
import sys

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
# Asked for by their names alone, each with options of its own: searches, verdicts, and what is driven or drawn.
OPTIONS: dict[str, tuple[str, ...]] = {
    "fuzz": ("minutes",),
    "faults": ("minutes", "faults", "seed"),
    "ray_model": (),
    "redis_cost": (),
    "capacity": ("seed",),
    "replicas": ("url", "start", "rate", "seconds", "seed"),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", choices=[*BENCHMARKS, *OPTIONS, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="few and short rounds: shows that it works, not how fast")
    parser.add_argument("--rounds", type=int, help="how often each server has its turn")
    parser.add_argument("--save", action="store_true", help="append the JSON to benchmarks/results/<name>.jsonl")
    parser.add_argument("--minutes", type=float, help="fuzz: of each of its two kinds (1); faults: of all (20)")
    parser.add_argument("--faults", type=int, help="faults: how many (20)")
    parser.add_argument("--url", action="append", help="replicas: one that runs; once for each")
    parser.add_argument("--start", type=int, help="replicas: without --url, how many to start here (2)")
    parser.add_argument("--rate", type=float, help="replicas: calls/s offered to all together (200)")
    parser.add_argument("--seconds", type=float, help="replicas: how long calls are sent (20)")
    parser.add_argument("--seed", type=int, help="faults, replicas, capacity: of what is drawn")
    given = parser.parse_args()
    prepare_process()
    names = BENCHMARKS if given.what == "all" else (given.what,)
    found = {}
    for name in names:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        more = {option: value for option in OPTIONS.get(name, ()) if (value := getattr(given, option)) is not None}
        found[name] = benchmark.run(quick=given.quick, rounds=given.rounds, save=given.save, **more)
    print(json.dumps(found if given.what == "all" else found[given.what]))
    # A verdict that is not met ends with 1.
    if not all(each.get("is_met", True) for each in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
