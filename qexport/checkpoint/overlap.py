"""Read, change and write at the same time: a stream of pieces, in order, in bounded memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

Item = TypeVar("Item")
Raw = TypeVar("Raw")
Done = TypeVar("Done")


class _Room:
    """Bytes that may be under way at once; a piece larger than all of it goes alone."""

    def __init__(self, size: int) -> None:
        self._size, self._free, self._open = size, size, True
        self._changed = threading.Condition()

    def take(self, size: int) -> bool:
        """Waits for room; False once nobody wants more."""
        wanted = min(size, self._size)
        with self._changed:
            self._changed.wait_for(lambda: not self._open or self._free >= wanted)
            self._free -= wanted
            return self._open

    def give(self, size: int) -> None:
        with self._changed:
            self._free += min(size, self._size)
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._open = False
            self._changed.notify()


class Overlap(Generic[Item, Raw, Done]):
    """Three stages at work at once: a thread that reads, `workers` that change, the caller that writes.

    `read` and `write` see the items in order; `change` is called from several threads. Tensors' work
    releases the interpreter's lock, so threads are enough. What any stage raises is raised by `run`,
    with nothing left running. torch has one thread for each while it runs.
    """

    def __init__(
        self,
        read: Callable[[Item], Raw],
        change: Callable[[Item, Raw], Done],
        write: Callable[[Item, Done], None],
        *,
        size: Callable[[Item], int],
        room: int,
        workers: int,
    ) -> None:
        self._read, self._change, self._write, self._size = read, change, write, size
        self._bytes, self._workers = room, workers

    def run(self, items: Iterable[Item]) -> None:
        """Takes every item through the three stages."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the items are what runs in parallel
        try:
            self._run(items)
        finally:
            torch.set_num_threads(threads)

    def _run(self, items: Iterable[Item]) -> None:
        room = _Room(self._bytes)
        queue: SimpleQueue[tuple[Item, Future[Done]] | BaseException | None] = SimpleQueue()
        with ThreadPoolExecutor(self._workers) as pool:
            reader = threading.Thread(target=self._feed, args=(items, pool, room, queue))
            reader.start()
            try:
                while (got := queue.get()) is not None:
                    if isinstance(got, BaseException):
                        raise got
                    item, future = got
                    self._write(item, future.result())
                    del got, future  # the piece is free before the next is asked for
                    room.give(self._size(item))
            finally:
                room.close()
                reader.join()
                pool.shutdown(cancel_futures=True)

    def _feed(
        self,
        items: Iterable[Item],
        pool: ThreadPoolExecutor,
        room: _Room,
        queue: SimpleQueue[tuple[Item, Future[Done]] | BaseException | None],
    ) -> None:
        try:
            for item in items:
                if not room.take(self._size(item)):
                    return
                queue.put((item, pool.submit(self._change, item, self._read(item))))
            queue.put(None)
        except BaseException as error:
            queue.put(error)
