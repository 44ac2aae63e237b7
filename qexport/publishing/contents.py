"""What of a directory would go to the Hub, and where to: all of it before anything is sent.

One output (a model, an adapter, GGUF files) goes as it lies; a directory of several as the user says, with
the report and a card of all of them. Nothing else that lies beside several goes along.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from qexport.checkpoint.disk import exists, is_file
from qexport.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    NotACheckpointError,
    SpecError,
    UnsafeFileError,
    first_of,
)
from qexport.events import Advanced, Finished, OnEvent, Started, ignore
from qexport.publishing.cleaning import paths_told
from qexport.publishing.layout import Item, Part, Plan, Upload, refuse_twins, side_by_side, told_place
from qexport.publishing.options import check_options, check_revision
from qexport.publishing.refusals import Finding, found_keys, is_pickle, refused_kind, refused_name
from qexport.publishing.spec import PushSpec
from qexport.publishing.wholeness import recorded, require_whole
from qexport.report.card_file import CARD_FILE, EMPTY, read_card
from qexport.report.card_outputs import is_output, output_names
from qexport.report.card_several import card_of_several
from qexport.report.files import REPORT_FILE, REPORT_FILES, read_report

_BESIDE = (CARD_FILE, *REPORT_FILES)  # what goes of a directory of several, beside these
_WORK = "scores"  # what a run keeps to go on from; of no use to anyone else


def plan_push(
    directory: Path, spec: PushSpec, *, own: Collection[str] = (), on_event: OnEvent = ignore
) -> Plan:
    """What `push` would send; reads the files, writes nothing and asks no network.

    `own` are the user's tokens, which are looked for too. Raises CheckpointNotFoundError and
    NotACheckpointError for a directory without an output, CorruptFileError for one that is not whole,
    UnsafeFileError for what must not go, SpecError for options that do not fit what is there.
    """
    if not exists(directory) or not directory.is_dir():
        raise CheckpointNotFoundError(
            f"{directory} {'is a file' if exists(directory) else 'does not exist'}",
            expected="a directory that qexport wrote, or one of several such",
        )
    single = is_output(directory)
    variants = [] if single else _chosen(directory, spec)
    if single:
        _check_single(directory, spec)
    if single or (len(variants) == 1 and spec.layout is None):
        root = None
        parts = [Part(directory.resolve().name, directory if single else directory / variants[0])]
    else:
        root = Part("report", directory)
        parts = [Part(name, directory / name) for name in variants]
    every = [*([root] if root else []), *parts]
    notes = _gather(directory, root, parts, spec, own)
    local = paths_told(part.directory for part in every)
    for part in every:
        part.local = local
    parts = [part for part in parts if part.files]
    if not parts:
        raise SpecError("--exclude leaves nothing to push", remedy="leave out fewer files")
    on_event(Started("checking", len(parts), "outputs"))
    for part in parts:
        notes += require_whole(part)
        on_event(Advanced(1, part.name))
    on_event(Finished())
    uploads = _uploads(root, parts, spec)
    return Plan(uploads, (*notes, *_paths_that_go(directory, uploads)))


def _chosen(directory: Path, spec: PushSpec) -> list[str]:
    """The variants that are to go."""
    variants = output_names(directory)
    if not variants:
        raise NotACheckpointError(
            f"{directory} holds no output",
            expected="a model, an adapter or GGUF files, with qexport.json, or subdirectories of such",
        )
    check_options(spec, variants)
    chosen = [name for name in variants if not spec.variant or name in spec.variant]
    if len(chosen) > 1 and spec.layout is None:
        raise SpecError(
            f"{directory} holds {len(chosen)} variants ({first_of(chosen)})",
            expected="--layout branches (a revision each) or --layout subfolders (all in one tree)",
            remedy="add one, or choose a variant with --variant NAME",
        )
    return chosen


def _check_single(directory: Path, spec: PushSpec) -> None:
    if spec.variant or spec.layout:
        raise SpecError(
            f"{'--variant' if spec.variant else '--layout'} is for a directory of several variants, and "
            f"{directory} is one output",
            remedy="leave it out",
        )
    check_revision(spec)


def _uploads(root: Part | None, parts: Sequence[Part], spec: PushSpec) -> tuple[Upload, ...]:
    if root is None:
        return (Upload(spec.revision, tuple(parts[0].items()), parts[0].name),)
    if spec.layout == "branches":
        beside = _beside(root, parts, spec, {})
        own = [Upload(part.name, tuple(part.items()), part.name) for part in parts]
        return (*own, Upload(None, tuple(beside), root.name)) if beside else tuple(own)
    items = side_by_side(parts)
    refuse_twins(items)
    paths = {}
    for part in parts:
        for item in items:
            if item.path.is_relative_to(part.directory):
                paths[part.name, item.path.relative_to(part.directory).as_posix()] = item.path_in_repo
    items += _beside(root, parts, spec, paths)
    refuse_twins(items)
    items.sort(key=lambda item: item.path_in_repo)
    return (Upload(spec.revision, tuple(items), first_of([part.name for part in parts])),)


def _beside(
    root: Part, parts: Sequence[Part], spec: PushSpec, paths: Mapping[tuple[str, str], str]
) -> list[Item]:
    """What goes beside the variants; the card tells where they are in the repository.

    A card without a part of ours, and one that cannot be read, goes as it lies.
    """
    items = {item.path_in_repo: item for item in root.items()}
    file = root.directory / CARD_FILE
    if any(_matches(Path(CARD_FILE), pattern) for pattern in spec.exclude):
        return list(items.values())
    card = EMPTY
    if is_file(file):
        try:
            card = read_card(file)
        except CorruptFileError:
            return list(items.values())
        if card.section is None:
            return list(items.values())
    text = card_of_several(
        root.directory,
        read_report(root.directory) if REPORT_FILE in items else None,
        [part.name for part in parts],
        card=card,
        paths=paths,
        branches=spec.layout == "branches",
    )
    if text is not None:
        content = text.encode()
        items[CARD_FILE] = Item(CARD_FILE, file, len(content), content)
    return list(items.values())


def _paths_that_go(directory: Path, uploads: Sequence[Upload]) -> list[str]:
    """Says which texts tell where something lies on this machine, which are not of our making."""
    home = [] if Path.home() == Path(Path.home().anchor) else [Path.home()]
    places = dict.fromkeys((directory.absolute(), directory.resolve(), *home))
    notes = []
    for item in (item for upload in uploads for item in upload.items):
        if place := told_place(item, places):
            notes.append(f"{item.path_in_repo} tells a path of this machine, {place}: pushed as found")
    return list(dict.fromkeys(notes))


def _gather(
    directory: Path, root: Part | None, parts: Sequence[Part], spec: PushSpec, own: Collection[str]
) -> list[str]:
    """Fills in the parts' files. Raises UnsafeFileError for the first few that must not go."""
    findings: list[Finding] = []
    used: set[str] = set()
    notes, others = list[str](), list[str]()
    for part in [*([root] if root else []), *parts]:
        for file in _walk(part.directory) if part is not root else _listed(directory):
            place = (part.directory / file).relative_to(directory)
            matching = {pattern for pattern in spec.exclude if _matches(place, pattern)}
            used |= matching
            if matching:
                continue
            if part is root and file.name not in _BESIDE:
                others.append(file.name)
                continue
            if finding := _refused(part, file, place, own):
                findings.append(finding)
            part.files.append(file)
        pickles = [file.as_posix() for file in part.files if is_pickle(file)]
        if pickles and not findings:
            notes.append(f"{first_of(pickles)}: a pickle that qexport wrote; the Hub warns its readers")
    if findings:
        findings = list({finding.path: finding for finding in findings}.values())
        excludes = " ".join(dict.fromkeys(f"--exclude '{finding.pattern}'" for finding in findings[:3]))
        told = [f"{finding.path} {finding.what}" for finding in findings]
        raise UnsafeFileError(
            f"{directory}: {first_of(told)}",
            expected="nothing of this kind goes to the Hub",
            remedy=f"take it away, or leave it out with {excludes}",
        )
    if others:
        notes.append(f"{first_of(others)}: no part of the report, left behind")
    notes += [f"--exclude {pattern!r} matches nothing" for pattern in spec.exclude if pattern not in used]
    return notes


def _listed(directory: Path) -> list[Path]:
    """What lies in a directory of several, beside the variants and what a run keeps for itself; sorted."""
    aside = {*output_names(directory), _WORK}
    return sorted(Path(child.name) for child in directory.iterdir() if child.name not in aside)


def _walk(directory: Path) -> list[Path]:
    """Everything below that is no directory, and links to directories; relative and sorted.

    A refused directory is named as a whole, not by each of its files.
    """
    found: list[Path] = []
    for here, directories, files in os.walk(directory):
        at = Path(here).relative_to(directory)
        linked = [name for name in directories if (Path(here) / name).is_symlink()]
        refused = [name for name in directories if refused_name(Path(name))]
        found += [at / name for name in (*files, *linked, *refused)]
        directories[:] = [name for name in directories if name not in {*linked, *refused}]
    return sorted(set(found))


def _matches(place: Path, pattern: str) -> bool:
    """Whether a pattern is meant for a file: by its path, its name, or those of a directory above it."""
    pattern = pattern.rstrip("/")
    above = [Path(*place.parts[:depth]) for depth in range(1, len(place.parts) + 1)]
    return any(fnmatch(path.as_posix(), pattern) or fnmatch(path.name, pattern) for path in above)


def _refused(part: Part, file: Path, place: Path, own: Collection[str]) -> Finding | None:
    path = part.directory / file
    if finding := refused_name(file):
        return Finding(
            place.as_posix() if finding.path == file.as_posix() else finding.path,
            finding.what,
            finding.pattern,
        )
    if what := refused_kind(path, part.directory):
        return Finding(place.as_posix(), what, place.as_posix())
    if is_pickle(file) and file.as_posix() not in recorded(part):
        return Finding(place.as_posix(), "is a pickle that qexport did not write", place.as_posix())
    for what in found_keys(path, own):
        return Finding(place.as_posix(), what, place.as_posix())
    return None
