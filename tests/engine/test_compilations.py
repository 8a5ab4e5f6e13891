"""Compiled models on disk: whole or gone, made once, no more of them than are used."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

import pytest

from app.engine import compilations
from app.engine.compilations import kept


def make(root: Path, key: str = "a") -> bool:
    """As a worker does; whether it had to compile."""
    with kept(root, key) as folder:
        is_new = not any(folder.iterdir())
        if is_new:
            (folder / "deep").mkdir()
            (folder / "deep" / "kernel.so").write_bytes(b"machine code")
            (folder / "model").write_bytes(b"what calls it")
        return is_new


def test_what_was_compiled_is_there_the_next_time(tmp_path: Path) -> None:
    assert make(tmp_path)
    assert not make(tmp_path)
    assert make(tmp_path, "another key")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda kernel: kernel.write_bytes(b"machine c0de"),
        lambda kernel: kernel.write_bytes(b"mach"),
        lambda kernel: kernel.unlink(),
        lambda kernel: (kernel.parents[1] / "whole.json").unlink(),
        lambda kernel: (kernel.parents[1] / "whole.json").write_bytes(b"{"),
        lambda kernel: (kernel.parents[1] / "whole.json").write_bytes(b"[1]"),
    ],
    ids=["flipped", "cut", "missing", "unsealed", "seal cut", "seal of another kind"],
)
def test_what_is_not_whole_is_compiled_anew(tmp_path: Path, spoil: object) -> None:
    make(tmp_path)
    spoil(tmp_path / "a" / "deep" / "kernel.so")  # type: ignore[operator]
    assert make(tmp_path)
    assert not make(tmp_path)


def test_what_broke_in_the_middle_is_not_taken_for_whole(tmp_path: Path) -> None:
    with contextlib.suppress(ZeroDivisionError), kept(tmp_path, "a") as folder:
        (folder / "kernel.so").write_bytes(b"half")
        raise ZeroDivisionError
    assert make(tmp_path)


def test_who_comes_second_waits_and_finds_it_made(tmp_path: Path) -> None:
    made = []
    second = threading.Thread(target=lambda: made.append(make(tmp_path)))
    with kept(tmp_path, "a") as folder:
        second.start()
        second.join(0.2)
        assert second.is_alive(), "it waits"
        (folder / "kernel.so").write_bytes(b"machine code")
    second.join()
    assert made == [False]


def test_those_that_were_used_last_stay(tmp_path: Path) -> None:
    for number in range(compilations.MOST_KEPT):
        make(tmp_path, str(number))
        # Two may be made within one tick of the file system's clock.
        os.utime(tmp_path / str(number) / "whole.json", (number, number))
    assert not make(tmp_path, "0"), "used again"
    assert make(tmp_path, "one more")
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == compilations.MOST_KEPT
    assert not make(tmp_path, "0")
    assert make(tmp_path, "1"), "the one that was not used for longest"
