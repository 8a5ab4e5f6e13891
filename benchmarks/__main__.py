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
    "ray_serve",
)
# Not a figure but a search: asked for by its name alone.
SEARCHES = ("fuzz",)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("what", nargs="?", choices=[*BENCHMARKS, *SEARCHES, "all"], default="all")
    parser.add_argument("--quick", action="store_true", help="few and short rounds: shows that it works, not how fast")
    parser.add_argument("--rounds", type=int, help="how often each server has its turn")
    parser.add_argument("--save", action="store_true", help="append the JSON to benchmarks/results/<name>.jsonl")
    parser.add_argument("--minutes", type=float, default=1.0, help="fuzz: how long each of its two kinds goes on")
    given = parser.parse_args()
    prepare_process()
    names = BENCHMARKS if given.what == "all" else (given.what,)
    found = {}
    for name in names:
        benchmark = importlib.import_module(f"benchmarks.{name}")
        more = {"minutes": given.minutes} if name in SEARCHES else {}
        found[name] = benchmark.run(quick=given.quick, rounds=given.rounds, save=given.save, **more)
    print(json.dumps(found if given.what == "all" else found[given.what]))


if __name__ == "__main__":
    main()
