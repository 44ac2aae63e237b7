"""Read, change and write at once: in order, within its room, and with nothing left running."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from qexport.checkpoint.overlap import Overlap


def overlap(
    write: Callable[[int, int], None],
    *,
    read: Callable[[int], int] = lambda item: item,
    change: Callable[[int, int], int] = lambda item, raw: raw,
    size: Callable[[int], int] = lambda item: 1,
    room: int = 8,
    workers: int = 3,
) -> Overlap[int, int, int]:
    return Overlap(read, change, write, size=size, room=room, workers=workers)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, which must not hang; what it raises is raised."""
    told: list[Any] = []

    def run() -> None:
        try:
            told.append((work(), None))
        except BaseException as error:
            told.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert told, f"still at work after {seconds} s"
    result, error = told[0]
    if error is not None:
        raise error
    return result


@pytest.mark.parametrize("workers", [1, 2, 7])
@pytest.mark.parametrize("room", [1, 3, 1000])
def test_read_and_written_in_order_each_item_once(workers: int, room: int) -> None:
    pauses = random.Random(workers)
    read: list[int] = []
    written: list[tuple[int, int]] = []

    def reads(item: int) -> int:
        read.append(item)
        return item + 100

    def changes(item: int, raw: int) -> int:
        assert raw == item + 100
        time.sleep(pauses.random() / 500)  # later pieces are ready before earlier ones
        return raw * 2

    run = overlap(
        lambda item, done: written.append((item, done)),
        read=reads,
        change=changes,
        room=room,
        workers=workers,
    )
    within(20, lambda: run.run(range(100)))
    assert read == list(range(100))
    assert written == [(item, 2 * (item + 100)) for item in range(100)]


def test_nothing_to_do() -> None:
    within(5, lambda: overlap(lambda item, done: None).run([]))


def test_the_stages_overlap() -> None:
    """Each waits for the others: one after the other they would never meet."""
    meeting = threading.Barrier(3, timeout=10)

    def read(item: int) -> int:
        if item == 2:
            meeting.wait()
        return item

    def change(item: int, raw: int) -> int:
        if item == 1:
            meeting.wait()
        return raw

    def write(item: int, done: int) -> None:
        if item == 0:
            meeting.wait()

    within(20, lambda: overlap(write, read=read, change=change).run(range(3)))


def test_workers_work_at_once() -> None:
    meeting = threading.Barrier(3, timeout=10)

    def change(item: int, raw: int) -> int:
        meeting.wait()
        return raw

    within(20, lambda: overlap(lambda item, done: None, change=change, workers=3).run(range(6)))


class _Ledger:
    """Bytes that were read and not yet written, at most."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.held, self.most, self.alone = sizes, dict[int, int](), 0, True
        self.lock = threading.Lock()

    def read(self, item: int) -> int:
        with self.lock:
            self.held[item] = self.sizes[item]
            self.most = max(self.most, sum(self.held.values()) if len(self.held) > 1 else 0)
        return item

    def write(self, item: int, done: int) -> None:
        time.sleep(0.0005)  # the writer is the slowest: reading runs ahead as far as it may
        with self.lock:
            del self.held[item]


@pytest.mark.parametrize("seed", range(4))
def test_no_more_bytes_are_under_way_than_there_is_room_for(seed: int) -> None:
    generator = random.Random(seed)
    room = 100
    sizes = [generator.choice([0, 1, 10, 40, 60, 99, 100, 101, 5000]) for _ in range(300)]
    ledger = _Ledger(sizes)
    run = overlap(ledger.write, read=ledger.read, size=sizes.__getitem__, room=room)
    within(20, lambda: run.run(range(len(sizes))))
    assert ledger.held == {}
    # pieces of no bytes may be beside one that is too large
    assert 40 < ledger.most <= room or 0 in sizes
    solid = [size or 1 for size in sizes]
    ledger = _Ledger(solid)
    within(
        20,
        lambda: overlap(ledger.write, read=ledger.read, size=solid.__getitem__, room=room).run(range(300)),
    )
    assert 40 < ledger.most <= room  # counts companions only: larger pieces went alone


class _Stop(BaseException):
    """No Exception, as a signal's is none."""


STAGES = ("items", "read", "change", "write", "size")


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, _Stop, MemoryError, StopIteration])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("at", [0, 5, 49])
def test_what_any_stage_raises_is_raised(stage: str, at: int, kind: type[BaseException]) -> None:
    if (stage, kind) == ("items", StopIteration):
        pytest.skip("an iterator that stops has ended")
    error, written = kind("enough"), list[int]()

    def fail(where: str, item: int) -> int:
        if where == stage and item == at:
            raise error
        return item

    class Items:
        def __init__(self) -> None:
            self.n = -1

        def __iter__(self) -> Items:
            return self

        def __next__(self) -> int:
            self.n += 1
            if self.n == 50:
                raise StopIteration
            return fail("items", self.n)

    def write(item: int, done: int) -> None:
        fail("write", item)
        written.append(item)

    run = overlap(
        write,
        read=lambda item: fail("read", item),
        change=lambda item, raw: fail("change", item),
        size=lambda item: fail("size", item) and 1,
    )
    with pytest.raises(kind) as raised:
        within(10, lambda: run.run(Items()))
    assert raised.value is error
    assert written == list(range(len(written)))
    assert at not in written


def test_an_error_while_the_reader_waits_for_room() -> None:
    """And while every worker is busy: `run` comes back, with nobody at work."""

    def write(item: int, done: int) -> None:
        time.sleep(0.05)
        raise KeyboardInterrupt

    def change(item: int, raw: int) -> int:
        time.sleep(0.02)
        return raw

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        within(10, lambda: overlap(write, change=change, room=2).run(range(10_000)))
    assert time.monotonic() - begun < 5


def test_after_an_error_no_more_is_read_than_was_under_way() -> None:
    read: list[int] = []

    def reads(item: int) -> int:
        read.append(item)
        return item

    def write(item: int, done: int) -> None:
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        within(10, lambda: overlap(write, read=reads, room=5).run(range(10_000)))
    assert len(read) <= 6


def test_it_can_run_again_even_after_an_error() -> None:
    written: list[int] = []

    def write(item: int, done: int) -> None:
        if item == 3 and len(written) == 3:
            raise ValueError("first time")
        written.append(item)

    run = overlap(write)
    with pytest.raises(ValueError, match="first time"):
        within(10, lambda: run.run(range(6)))
    within(10, lambda: run.run(range(10, 16)))
    assert written == [0, 1, 2, 10, 11, 12, 13, 14, 15]


def test_a_piece_is_let_go_once_it_is_written() -> None:
    """Memory is what was given room, not what went by."""
    alive, most = 0, 0
    lock = threading.Lock()

    class Piece:
        def __init__(self) -> None:
            nonlocal alive, most
            with lock:
                alive += 1
                most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            with lock:
                alive -= 1

    run: Overlap[int, Piece, Piece] = Overlap(
        lambda item: Piece(),
        lambda item, piece: Piece(),
        lambda item, piece: None,
        size=lambda item: 1,
        room=4,
        workers=2,
    )
    within(10, lambda: run.run(range(200)))
    assert alive == 0
    assert most <= 2 * (4 + 1)  # a piece as it was read and as it was changed; one more is being let go
