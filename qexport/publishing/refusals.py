"""What must not go to the Hub: secrets, caches, what a training left, files that run code when opened."""

from __future__ import annotations

import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from qexport.checkpoint.disk import read_errors

# names, of files and directories alike, in lower case
_SECRETS = (
    ".env",
    ".env.*",
    "*.env",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.ppk",
    "*.kdbx",
    ".netrc",
    "_netrc",
    ".npmrc",
    ".pypirc",
    ".git-credentials",
    ".ssh",
    ".aws",
    ".gnupg",
)
_SECRET_WORDS = {"token", "secret", "secrets", "credential", "credentials", "password", "passwd", "apikey"}
_CACHES = (
    ".git",
    ".hg",
    ".svn",
    ".cache",
    "__pycache__",
    ".ipynb_checkpoints",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
    ".venv",
    "node_modules",
    "wandb",
    ".ds_store",
    "*.lock",
    "*.tmp",
    "*.incomplete",
    ".*.qexport-*",  # what a killed run of ours leaves, until the next one: StagedDirectory's
)
_UNFINISHED = re.compile(r"\..+\.\w+\.[a-z0-9_]{8}")  # and whole_file's
_TRAINING = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "*optim_states.pt",
    "global_step*",
    "checkpoint-[0-9]*",
)
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_WEIGHTS = (".safetensors", ".gguf", *_PICKLES)
_LARGEST_TEXT = 64 << 20  # bytes; what is larger and no weights is no place where a key ends up

# (what it is, how it looks); none of them is found in running text or in a vocabulary
_KEYS = (
    ("a private key", re.compile(rb"-----BEGIN [A-Z0-9 ]{0,30}PRIVATE KEY")),
    ("a Hugging Face token", re.compile(rb"(?<![A-Za-z0-9_])(?:hf|api_org)_[A-Za-z0-9]{30,}")),
    ("a GitHub token", re.compile(rb"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{50,})")),
    # of letters, a capital and a digit among them: 'sk-' begins hyphenated words too
    ("an API key", re.compile(rb"(?<![\w-])sk-(?=[\w-]*[0-9])(?=[\w-]*[A-Z])[\w-]{20,}")),
    ("an AWS key", re.compile(rb"(?<![A-Za-z0-9])AKIA[0-9A-Z]{16}(?![A-Za-z0-9])")),
    ("a Slack token", re.compile(rb"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{20,}")),
)


@dataclass(frozen=True)
class Finding:
    """Something that must not go: its path from the directory, what it is, what --exclude takes for it."""

    path: str
    what: str
    pattern: str


def refused_name(path: Path) -> Finding | None:
    """A secret, a cache or what a training left, told by a name along `path`, which is relative."""
    for depth, part in enumerate(path.parts, start=1):
        name, at = part.lower(), Path(*path.parts[:depth]).as_posix()
        if any(fnmatch(name, pattern) for pattern in _SECRETS) or (
            _SECRET_WORDS & set(re.split(r"[^a-z]+", name))
        ):
            return Finding(at, "may be a secret", part)
        if any(fnmatch(name, pattern) for pattern in _CACHES) or _UNFINISHED.fullmatch(name):
            return Finding(at, "is a cache or work under way", part)
        if any(fnmatch(name, pattern) for pattern in _TRAINING):
            return Finding(at, "is the state of a training", part)
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return Finding(repr(path.as_posix()), "has a name that is no UTF-8", "PATTERN")
    if not path.as_posix().isprintable() or "\\" in path.as_posix():
        return Finding(repr(path.as_posix()), "has a name that the Hub cannot take", "PATTERN")
    return None


def refused_kind(path: Path, directory: Path) -> str | None:
    """Why what lies at `path` is nothing to send: a link out of `directory`, a dangling one, a pipe."""
    if path.is_symlink():
        target = path.resolve()
        if directory.resolve() not in target.parents:
            return "is a link that leads out of the directory"
        if not target.exists():
            return "is a link to nothing"
        if target.is_dir():
            return "is a link to a directory"
    return None if stat.S_ISREG(path.stat().st_mode) else "is no regular file"


def is_pickle(path: Path) -> bool:
    """Whether a file's name is that of a pickle, which can run code when it is opened."""
    return path.suffix.lower() in _PICKLES


def found_keys(path: Path, own: Collection[str] = ()) -> Iterator[str]:
    """The kinds of keys and tokens in a text, and where; never themselves. `own` are the user's tokens.

    Weights and what is larger than 64 MiB are not looked into. Raises StorageError.
    """
    if path.suffix.lower() in _WEIGHTS or path.stat().st_size > _LARGEST_TEXT:
        return
    with read_errors(path):
        content = path.read_bytes()
    for what, pattern in _KEYS:
        if found := pattern.search(content):
            line = content.count(b"\n", 0, found.start()) + 1
            yield f"holds {what} in line {line}"
    if any(token.encode() in content for token in own):
        yield "holds your Hugging Face token"
