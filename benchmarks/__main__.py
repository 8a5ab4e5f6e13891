"""`python -m benchmarks NAME [--quick] [--rounds N] [--save]`, or `all` of them: LOG.md has what was found."""

from __future__ import annotations

import argparse
import importlib
import json

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
)
# Asked for by their names alone, each with options of its own: a search, and what is driven or drawn as one likes.
OPTIONS: dict[str, tuple[str, ...]] = {
    "fuzz": ("minutes",),
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
    parser.add_argument("--minutes", type=float, default=1.0, help="fuzz: how long each of its two kinds goes on")
    parser.add_argument("--url", action="append", default=[], help="replicas: one that runs; once for each")
    parser.add_argument("--start", type=int, default=2, help="replicas: without --url, how many to start here")
    parser.add_argument("--rate", type=float, default=200.0, help="replicas: calls/s offered to all together")
    parser.add_argument("--seconds", type=float, default=20.0, help="replicas: how long calls are sent")
    parser.add_argument("--seed", type=int, default=1, help="replicas, capacity: of what is drawn")
    given = parser.parse_args()
    prepare_process()
    names = BENCHMARKS if given.what == "all" else (given.what,)
    found = {}
    for name in names:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        more = {option: getattr(given, option) for option in OPTIONS.get(name, ())}
        found[name] = benchmark.run(quick=given.quick, rounds=given.rounds, save=given.save, **more)
    print(json.dumps(found if given.what == "all" else found[given.what]))


if __name__ == "__main__":
    main()
