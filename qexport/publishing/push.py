"""An output to the Hub: the repository, the large files one by one, and the commit last of all.

Large files go to the storage first, where the server knows them by their hash: what is there already is not
sent again, so an interrupted push goes on where it was. A commit then names them all at once; until then
nobody sees anything. huggingface_hub's `upload_large_folder` would make a commit a batch, half a model
among them.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qexport.errors import SpecError, first_of
from qexport.events import Finished, Noted, OnEvent, Started, ignore
from qexport.publishing.contents import plan_push
from qexport.publishing.hub_client import LOGIN, Client, HubError, Patience, Scrubber
from qexport.publishing.layout import Item, Plan, Upload
from qexport.publishing.sending import Sender
from qexport.publishing.spec import PushSpec

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

_MAIN = "main"
_NAME = re.compile(r"\w(?:[\w.-]*\w)?", re.ASCII)
_OWN_FILES = {".gitattributes"}  # the Hub's
_MAYBE_DONE = {None, 408, 409, 412, 500, 502, 503, 504}  # answers to a commit that may have been made


@dataclass(frozen=True)
class Pushed:
    """One revision: its commit, how many files and bytes were to be there, and what had to be sent.

    `sent_bytes` are those of large files, None by Xet, which sends the pieces that are missing. `changed`
    is False where all was there already and no commit was needed.
    """

    revision: str
    commit: str
    files: int
    size_bytes: int
    sent_bytes: int | None
    changed: bool


@dataclass(frozen=True)
class PushResult:
    """Where the output is now."""

    repo_id: str
    url: str
    private: bool
    created: bool
    revisions: tuple[Pushed, ...]


def push(
    directory: Path,
    repo_id: str,
    spec: PushSpec | None = None,
    *,
    endpoint: str | None = None,
    patience: Patience | None = None,
    on_event: OnEvent = ignore,
) -> PushResult:
    """Sends an output, or several variants, to the repository `repo_id`, and asks whether all is there then.

    The repository is made if it is missing; one that is there keeps its visibility. `endpoint` is the Hub's
    address, by default HF_ENDPOINT's. `directory` is not changed, and the token is told nobody.
    Raises as `plan_push` and `check_repo_id` before anything is sent, then HubError.
    """
    spec = spec or PushSpec()
    check_repo_id(repo_id)
    token = require_token()
    plan = plan_push(directory, spec, own=(token,), on_event=on_event)
    for note in plan.notes:
        on_event(Noted(note))
    return _Push(repo_id, spec, token, endpoint, patience or Patience(), on_event).run(plan)


def check_repo_id(repo_id: str) -> None:
    """Raises SpecError for what cannot be a repository's id."""
    # the rules of huggingface_hub.utils.validate_repo_id, which cannot be asked without loading it
    parts, unfit = repo_id.split("/"), ("--", "..")
    if (
        len(parts) > 2
        or len(repo_id) > 96
        or not all(_NAME.fullmatch(part) for part in parts)
        or any(text in repo_id for text in unfit)
        or repo_id.endswith(".git")
    ):
        raise SpecError(
            f"{repo_id!r} is no repository id",
            expected="NAME or NAMESPACE/NAME, of letters, digits, '-', '_' and '.', 96 characters at most",
        )


def require_token() -> str:
    """The user's token, from HF_TOKEN or the login. Raises HubError when there is none."""
    from huggingface_hub import get_token

    try:
        token = get_token()
    except Exception as error:  # a login that has to be renewed asks the network; its text may hold the token
        raise HubError(
            f"the login to the Hub could not be read ({type(error).__name__})", remedy=LOGIN
        ) from None
    if not token:
        raise HubError("no token for the Hub", expected="one with write access", remedy=LOGIN)
    return token


class _Push:
    """One push: what its steps share."""

    def __init__(
        self,
        repo_id: str,
        spec: PushSpec,
        token: str,
        endpoint: str | None,
        patience: Patience,
        on_event: OnEvent,
    ) -> None:
        from huggingface_hub import HfApi

        self.repo_id, self.spec, self.on_event = repo_id, spec, on_event
        self.api: HfApi = HfApi(endpoint=endpoint or os.environ.get("HF_ENDPOINT"), token=token)
        self.client = Client(patience, Scrubber(token), lambda text: self.sender.tell(Noted(text)))
        self.sender = Sender(self.api, self.client, on_event)

    def run(self, plan: Plan) -> PushResult:
        """The whole way; stopped in between, it says how it goes on."""
        with self.client.installed():
            try:
                with self.client.errors(self.repo_id):
                    private, created = self._repository()
                    pushed = tuple(self._upload(upload) for upload in plan.uploads)
            except BaseException as error:
                self.client.stop()
                if not isinstance(error, Exception):
                    self.on_event(Noted("the push stopped; the same command goes on from there"))
                raise
        return PushResult(self.repo_id, f"{self.api.endpoint}/{self.repo_id}", private, created, pushed)

    def _repository(self) -> tuple[bool, bool]:
        """Whether it is private, and whether it was made now. A visibility that is there is not changed."""
        from huggingface_hub.errors import HfHubHTTPError

        if "/" not in self.repo_id:
            self.repo_id = f"{self.api.whoami()['name']}/{self.repo_id}"
        created = False
        try:
            info = self.api.model_info(self.repo_id)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise
            self.api.create_repo(self.repo_id, private=not self.spec.public, exist_ok=True)
            info, created = self.api.model_info(self.repo_id), True
        private = bool(info.private)
        if created and not private and not self.spec.public:
            raise HubError(
                f"{self.repo_id} was made, but the server made it public; nothing was sent",
                remedy="look at the settings of the namespace, or push with --public",
            )
        if not created and private == self.spec.public:
            says = "stays private" if private else "is public: everyone sees what is pushed"
            self.on_event(Noted(f"{self.repo_id} is there already and {says}"))
        return private, created

    def _upload(self, upload: Upload) -> Pushed:
        """One commit and what comes before it."""
        revision = upload.revision or _MAIN
        head = self._head(revision)
        self.on_event(Started(f"push {upload.what}", upload.size_bytes, "bytes"))
        additions, sent = self.sender.send(self.repo_id, revision, upload.items)
        self.on_event(Finished())
        message = self.spec.message or f"Push {upload.what} with qexport"
        commit = self._commit(upload, additions, revision, message)
        if wrong := self._missing(upload, additions, revision, tell_others=True):
            raise HubError(
                f"after the push, {self.repo_id} at {revision} lacks {first_of(wrong)} or has another "
                f"content there",
                expected="all files as they are here; a .gitignore in the repository may keep some out",
                remedy="push again",
            )
        return Pushed(revision, commit, len(upload.items), upload.size_bytes, sent, commit != head)

    def _head(self, revision: str) -> str:
        """The branch's commit; a missing branch is made, holding nothing of the others."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return str(self.api.model_info(self.repo_id, revision=revision).sha)
        except HfHubHTTPError as error:
            if error.response.status_code != 404 or revision == _MAIN:
                raise
        # the first commit is the Hub's own and holds .gitattributes alone (list_repo_commits' documentation)
        first = self.api.list_repo_commits(self.repo_id)[-1].commit_id
        self.api.create_branch(self.repo_id, branch=revision, revision=first, exist_ok=True)
        return first

    def _commit(
        self, upload: Upload, additions: dict[str, CommitOperationAdd], revision: str, message: str
    ) -> str:
        """Makes the commit; where the answer got lost, looks whether it was made before it tries again."""
        patience, ordered = self.client.patience, [additions[item.path_in_repo] for item in upload.items]
        for attempt in range(1, patience.attempts + 1):
            try:
                with self.client.errors(self.repo_id), warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always", UserWarning)  # what the Hub thinks of the model card
                    made = self.api.create_commit(
                        self.repo_id, ordered, commit_message=message, revision=revision
                    )
                for warning in told:
                    if issubclass(warning.category, UserWarning):
                        self.on_event(Noted(self.client.scrub(str(warning.message))))
                return str(made.oid)
            except HubError as error:
                if error.status not in _MAYBE_DONE:
                    raise
                if not self._missing(upload, additions, revision):
                    return self._head(revision)
                if attempt == patience.attempts:
                    raise
                self.on_event(Noted(f"the commit was not made: {error.found}; tried again"))
                self.client.wait(min(patience.first_wait * 2.0 ** (attempt - 1), patience.longest_wait))
        raise AssertionError("the last attempt returns or raises")

    def _missing(
        self,
        upload: Upload,
        additions: dict[str, CommitOperationAdd],
        revision: str,
        *,
        tell_others: bool = False,
    ) -> list[str]:
        """Files that the server's own listing lacks, or has with another size or hash."""
        from huggingface_hub.hf_api import RepoFile

        listed = self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision)
        there = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        ours = {item.path_in_repo for item in upload.items}
        if tell_others and (others := sorted(set(there) - ours - _OWN_FILES)):
            self.on_event(Noted(f"{self.repo_id} at {revision} also has {first_of(others)}: left as found"))
        return [item.path_in_repo for item in upload.items if not _same(item, additions, there)]


def _same(item: Item, additions: dict[str, CommitOperationAdd], there: dict[str, Any]) -> bool:
    """Whether the server has a file as it was sent: by its SHA-256 in the storage, else by git's hash."""
    held = there.get(item.path_in_repo)
    if held is None or held.size != item.size:
        return False
    if held.lfs is not None:
        return bool(held.lfs.sha256 == additions[item.path_in_repo].upload_info.sha256.hex())
    with additions[item.path_in_repo].as_file() as file:
        content = file.read()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return bool(held.blob_id == blob)
