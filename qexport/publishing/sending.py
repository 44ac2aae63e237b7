"""The files of one commit, to the Hub's storage: the small ones at once, the large ones several at a time.

Which files the storage takes, and which go along with the commit, the server decides (`preupload`). Where it
offers Xet and hf_xet is installed, large files go by that: it sends the pieces that the storage lacks, of a
file that was cut off too. Elsewhere they go by LFS over HTTP (git-lfs, docs/api/batch.md), a whole file or
part of one a request.
"""

from __future__ import annotations

import importlib.util
import io
import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from qexport.checkpoint.disk import read_errors
from qexport.events import Advanced, Event, OnEvent
from qexport.publishing.hub_client import Client, StorageRefusedError
from qexport.publishing.layout import Item

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

THREADS = "qexport push"
_PATIENCE = {True: 5.0, False: 0.5}  # seconds for the threads to end: after an error, after Ctrl-C
_SMALL = 1 << 20  # bytes; smaller files go along with the commit, unless they are weights
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")


class _Stoppable(io.BufferedReader):
    """A file whose reading, be it to hash or to send it, ends when the push does."""

    def __init__(self, path: Path, client: Client) -> None:
        super().__init__(io.FileIO(path))
        self._client = client

    def read(self, size: int | None = -1, /) -> bytes:
        self._client.wait(0)
        return super().read(size)


class Sender:
    """Sends for the thread that made it, whose listener it calls in no other."""

    def __init__(self, api: HfApi, client: Client, on_event: OnEvent) -> None:
        self._api, self._client, self._on_event = api, client, on_event
        self._events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._home = threading.get_ident()

    def tell(self, event: Event) -> None:
        """An event to the listener; another thread's waits until the files under way are looked after."""
        if threading.get_ident() == self._home:
            self._on_event(event)
        else:
            self._events.put(event)

    def send(
        self, repo_id: str, revision: str, items: Sequence[Item]
    ) -> tuple[dict[str, CommitOperationAdd], int | None]:
        """Path -> addition for the commit, which needs no more uploads; the bytes of large files sent.

        Those are None where Xet sent them. Raises HubError, StorageError, and what huggingface_hub raises.
        """
        additions = self._small(repo_id, revision, [item for item in items if not _is_large(item)])
        large = [item for item in items if _is_large(item)]
        by_xet = bool(large) and self._offers_xet(repo_id, revision)
        sent = self._large(repo_id, revision, large, additions, by_xet=by_xet)
        return additions, None if by_xet else sent

    def _offers_xet(self, repo_id: str, revision: str) -> bool:
        """Whether both sides have Xet; huggingface_hub by itself asks its own side only."""
        from huggingface_hub import constants, get_session

        if constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
            return False
        answer = get_session().get(
            f"{self._api.endpoint}/api/models/{repo_id}/xet-write-token/{quote(revision, safe='')}",
            headers={"authorization": f"Bearer {self._api.token}"},
        )
        return bool(answer.status_code == 200)

    def _small(self, repo_id: str, revision: str, items: Sequence[Item]) -> dict[str, CommitOperationAdd]:
        """Asks the server of all of them at once, which also tells early whether we may write there."""
        from huggingface_hub import CommitOperationAdd

        additions = {}
        for item in items:
            content = item.content
            if content is None:
                with read_errors(item.path):
                    content = item.path.read_bytes()
            additions[item.path_in_repo] = CommitOperationAdd(item.path_in_repo, io.BytesIO(content))
        if additions:
            self._api.preupload_lfs_files(
                repo_id, list(additions.values()), revision=revision, num_threads=1, free_memory=False
            )
            self._on_event(Advanced(sum(item.size for item in items), "small files"))
        return additions

    def _large(
        self,
        repo_id: str,
        revision: str,
        items: Sequence[Item],
        additions: dict[str, CommitOperationAdd],
        *,
        by_xet: bool,
    ) -> int:
        """Sends them, adds them to `additions`, and says how many bytes that took."""
        waiting: queue.SimpleQueue[Item] = queue.SimpleQueue()
        for item in items:
            waiting.put(item)

        def work() -> None:
            try:
                while True:
                    self._client.wait(0)
                    self._events.put(self._one(repo_id, revision, waiting.get_nowait(), by_xet=by_xet))
            except queue.Empty:
                return
            except BaseException as error:  # for the thread that waits
                self._events.put(error)

        threads = [  # daemons: none outlives a process that is stopped
            threading.Thread(target=work, name=THREADS, daemon=True)
            for _ in range(min(self._client.patience.files_at_once, len(items)))
        ]
        for thread in threads:
            thread.start()
        try:
            return self._gather(len(items), additions)
        except BaseException as error:
            self._client.stop()
            end = time.monotonic() + _PATIENCE[isinstance(error, Exception)]
            for thread in threads:
                thread.join(max(0.0, end - time.monotonic()))
            raise

    def _gather(self, count: int, additions: dict[str, CommitOperationAdd]) -> int:
        """Waits for `count` files of the threads that send, telling their events; the bytes sent."""
        done = sent = 0
        while done < count:
            event = self._events.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, tuple):
                addition, bytes_sent = event
                additions[addition.path_in_repo] = addition
                done, sent = done + 1, sent + bytes_sent
            else:
                self._on_event(event)
        return sent

    def _one(
        self, repo_id: str, revision: str, item: Item, *, by_xet: bool
    ) -> tuple[CommitOperationAdd, int]:
        """One file, and how many bytes had to be sent: none when the server has it."""
        from huggingface_hub import CommitOperationAdd

        sent = 0

        def count(size: int) -> None:
            nonlocal sent
            sent += size
            self._events.put(Advanced(size, item.path_in_repo))

        with (
            read_errors(item.path),
            _Stoppable(item.path, self._client) as file,
            self._client.counting(count),
        ):
            # an open file huggingface_hub hashes and sends by LFS; a path by Xet, where that is installed
            content = item.path if by_xet else file
            addition = CommitOperationAdd(item.path_in_repo, content)
            try:
                self._preupload(repo_id, revision, addition)
            except StorageRefusedError:
                # links to the storage are valid for a while only: once more, with a new one
                file.seek(0)
                count(-sent)
                self._preupload(repo_id, revision, addition)
            if addition.path_or_fileobj is file:  # none for the storage: it goes along with the commit
                addition.path_or_fileobj = io.BytesIO(item.path.read_bytes())
        self._events.put(Advanced(item.size - sent, item.path_in_repo))
        return addition, sent

    def _preupload(self, repo_id: str, revision: str, addition: CommitOperationAdd) -> None:
        with self._client.errors(repo_id):
            self._api.preupload_lfs_files(repo_id, [addition], revision=revision)


def _is_large(item: Item) -> bool:
    if item.content is not None:
        return False
    return item.size >= _SMALL or (item.size > 0 and item.path.suffix in _WEIGHTS)
