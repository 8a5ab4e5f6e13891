"""One target of `fuzz_targets`, fed in a process of its own: guided by coverage, or by mutations from a seed.

Nothing of ours is imported before it is instrumented.
"""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

CORPUS = Path(__file__).resolve().parents[1] / ".cache" / "fuzz"


def _fuzz(target: str, seconds: float, seed: int) -> None:
    if importlib.util.find_spec("atheris") is None:
        print("no atheris here (pip install atheris): blind mutation of good inputs, without coverage")
        count = mutated(target, seed, until=time.monotonic() + seconds)
        print(f"{count} runs in {seconds:.0f} s")
        return
    import atheris

    with atheris.instrument_imports(include=["app"]):
        from benchmarks.fuzz_targets import TARGETS, seeds
    corpus = CORPUS / target
    corpus.mkdir(parents=True, exist_ok=True)
    for number, each in enumerate(seeds(target)):
        (corpus / f"seed-{number}").write_bytes(each)
    options = [f"-max_total_time={seconds:.0f}", f"-seed={seed}", "-max_len=16384", f"-artifact_prefix={CORPUS}/"]
    options += ["-timeout=20", "-rss_limit_mb=3000", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], TARGETS[target])
    atheris.Fuzz()


def mutated(target: str, seed: int, *, until: float = float("inf"), count: int = 2**62) -> int:
    """Feed good inputs with small faults to a target, the same ones for the same seed. Returns how many."""
    from benchmarks.fuzz_targets import TARGETS, seeds

    feed, done = TARGETS[target], 0
    for done, data in enumerate(_mutations(seeds(target), random.Random(seed)), start=1):
        feed(data)
        if done >= count or time.monotonic() >= until:
            break
    return done


def _mutations(good: list[bytes], chance: random.Random) -> Iterator[bytes]:
    yield from good
    while True:
        data = bytearray(chance.choice(good))
        for _ in range(chance.choice((1, 1, 2, 5))):
            chance.choice(_FAULTS)(data, chance)
        yield bytes(data)


def _flip(data: bytearray, chance: random.Random) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _cut(data: bytearray, chance: random.Random) -> None:
    del data[chance.randint(0, len(data)) :]


def _drop(data: bytearray, chance: random.Random) -> None:
    at = chance.randint(0, len(data))
    del data[at : at + chance.randint(1, 20)]


def _repeat(data: bytearray, chance: random.Random) -> None:
    at = chance.randint(0, len(data))
    data[at:at] = data[at : at + chance.randint(1, 40)] * chance.randint(1, 4)


def _insert(data: bytearray, chance: random.Random) -> None:
    at = chance.randint(0, len(data))
    data[at:at] = chance.choice(_TOKENS)


_FAULTS: tuple[Callable[[bytearray, random.Random], None], ...] = (_flip, _cut, _drop, _repeat, _insert)
_TOKENS = (
    b"null", b"true", b"-1", b"1e999", b"9" * 25, b"[]", b"{}", b'""', b"[[", b'{"a":', b"\\u0000", b"\\ud800", b"\n\n",
    b"data: ", b"data: [DONE]\n\n", b"\xff", b"\x00", b"event: error\n", b'"stream":1,', b'"model":null,', b"\xc1",
)  # fmt: skip


def _main(arguments: list[str]) -> None:
    target, given, *rest = arguments
    if Path(given).is_file():
        from benchmarks.fuzz_targets import TARGETS

        TARGETS[target](Path(given).read_bytes())
        return
    _fuzz(target, float(given), int(rest[0]))


if __name__ == "__main__":
    _main(sys.argv[1:])
