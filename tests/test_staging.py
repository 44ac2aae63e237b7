"""An output appears under its name whole or not at all, whatever stops the run: killed, full, refused."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qexport
from qexport.checkpoint.staging import (
    StagedDirectory,
    check_target,
    check_target_file,
    whole_file,
    write_file_atomically,
)
from qexport.errors import OutputExistsError, StorageError
from qexport.events import Advanced, Event, Finished, Noted, Started
from qexport.methods import FORMATS
from qexport.specs import ShardSpec, spec_of
from tests.conftest import RunCli

# A shell in the background starts its children with SIGINT ignored; Ctrl-C must reach this one.
START = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, '-m', 'qexport', *sys.argv[1:]])"
)
MANY = 10_000  # tensors that take long enough to be stopped between
INTERRUPTED = "error: interrupted; nothing unfinished was left behind\n"


def small(directory: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """What `qexport shard` takes for a model."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    save_file(tensors or {"a": torch.arange(6.0)}, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of so many tensors that writing it takes a while."""
    tensors = {f"t{n}": torch.full((16,), float(n)) for n in range(MANY)}
    return small(tmp_path_factory.mktemp("slow") / "model", tensors)


def content(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes()
        for file in directory.rglob("*")
        if file.is_file()
    }


def hidden(directory: Path) -> list[str]:
    """What lies beside the output and should not."""
    return sorted(file.name for file in directory.iterdir() if file.name.startswith("."))


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """What takes longer fails."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def told_in_one_line(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


class Midway:
    """A run of `qexport shard` that is stopped (SIGSTOP) while it writes its tensors."""

    def __init__(self, model: Path, out: Path, *options: str) -> None:
        for _ in range(5):
            self.process = subprocess.Popen(
                [sys.executable, "-c", START, "shard", str(model), "-o", str(out), "--quiet", *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            begun = time.monotonic()
            while self.process.poll() is None and time.monotonic() - begun < 60:
                if list(out.parent.glob(f".{out.name}.qexport-partial-*/*.safetensors")):
                    self.stop()
                    break
                time.sleep(0.001)
            found = list(out.parent.glob(f".{out.name}.qexport-partial-*/config.json"))
            if self.process.poll() is None and not found and hidden(out.parent):
                self.partial = out.parent / hidden(out.parent)[0]
                return
            self.kill()  # it was already past its tensors: try once more
            shutil.rmtree(out, ignore_errors=True)
        pytest.fail("could not stop the run in its middle")

    def stop(self) -> None:
        """Returns when the process stands still, not when it has been told to."""
        self.process.send_signal(signal.SIGSTOP)
        status = os.waitpid(self.process.pid, os.WUNTRACED)[1]
        if not os.WIFSTOPPED(status):
            self.process.returncode = os.waitstatus_to_exitcode(status)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def end(self, number: int = signal.SIGCONT) -> tuple[int, str, str]:
        """Sends the signal, lets the run go on and waits for its end."""
        self.process.send_signal(number)
        self.process.send_signal(signal.SIGCONT)
        try:
            out, err = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        return self.process.returncode, out, err


@pytest.mark.parametrize(
    ("number", "code", "replace"),
    [
        (signal.SIGINT, 130, False),
        (signal.SIGTERM, 143, False),
        (signal.SIGINT, 130, True),
        (signal.SIGKILL, -9, False),
        (signal.SIGKILL, -9, True),
    ],
)
def test_a_run_that_is_stopped_midway(
    slow: Path, tmp_path: Path, number: signal.Signals, code: int, replace: bool
) -> None:
    out = tmp_path / "out"
    if replace:
        small(out)
    before = content(out)
    midway = Midway(slow, out, *(["--overwrite"] if replace else []))
    found, said, err = midway.end(number)
    assert (found, said) == (code, "")
    assert out.exists() is replace
    assert content(out) == before
    if number == signal.SIGKILL:
        assert midway.partial.is_dir()
        model = small(tmp_path / "model")
        qexport.shard(model, out, overwrite=replace)
        assert load_file(out / "model.safetensors")["a"].tolist() == [0, 1, 2, 3, 4, 5]
    else:
        assert err == INTERRUPTED
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_runs_into_one_output(slow: Path, tmp_path: Path, overwrite: bool) -> None:
    """Neither deletes the other's work; the later one replaces the earlier's only when it may."""
    out = tmp_path / "out"
    midway = Midway(slow, out, *(["--overwrite"] if overwrite else []))
    try:
        working = content(midway.partial)
        qexport.shard(small(tmp_path / "model"), out)
        assert content(midway.partial) == working
        first = content(out)
    except BaseException:
        midway.kill()
        raise
    result = midway.end()
    if overwrite:
        assert result == (0, "", "")
        assert len(load_file(out / "model.safetensors")) == MANY
    else:
        assert "is there already" in told_in_one_line(result)
        assert content(out) == first
    assert hidden(tmp_path) == []


def test_an_output_that_is_there_is_refused_or_replaced(tmp_path: Path, cli: RunCli) -> None:
    model, out = small(tmp_path / "model"), small(tmp_path / "out", {"old": torch.ones(1)})
    (out / "old.txt").touch()
    before = content(out)
    err = told_in_one_line(cli("shard", model, "-o", out))
    assert err == f"error: {out} is there already; add --overwrite, or choose another place with -o\n"
    assert content(out) == before
    err = told_in_one_line(cli("shard", model, "-o", out, "--overwrite"))
    assert f"error: {out} holds old.txt; a directory is replaced only when" in err
    assert content(out) == before
    (out / "old.txt").unlink()
    assert cli("shard", model, "-o", out, "--overwrite", "-q") == (0, "", "")
    assert sorted(content(out)) == ["README.md", "config.json", "model.safetensors", "qexport.json"]
    assert list(load_file(out / "model.safetensors")) == ["a"]
    # a model card that people wrote in outlives what it describes
    (out / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert cli("shard", model, "-o", out, "--overwrite", "-q") == (0, "", "")
    card = (out / "README.md").read_text()
    assert "license: mit" in card
    assert "# Mine\n" in card
    assert "qexport shard" in card
    assert hidden(tmp_path) == []


def test_what_overwrite_does_not_replace(tmp_path: Path, cli: RunCli) -> None:
    model = small(tmp_path / "models" / "one")
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.txt").write_text("years of work")
    file = tmp_path / "file"
    file.write_text("x")
    link, linked = tmp_path / "link", small(tmp_path / "linked")
    link.symlink_to(linked)
    dangling = tmp_path / "dangling"
    dangling.symlink_to("nowhere")
    alias = tmp_path / "alias"
    alias.symlink_to(model)
    small(tmp_path / "models")  # a model that holds the input
    before = content(tmp_path)
    for out, reason in (
        (notes, "is no model directory; models only are replaced"),
        (file, "is there already and is no directory"),
        (link, "is no model directory"),
        (dangling, "is there already and is no directory"),
        (model, f"is or holds the input {model}"),
        (alias, f"is or holds the input {model}"),
        (model / ".." / "one", f"is or holds the input {model}"),
        (tmp_path / "models", f"is or holds the input {model}"),
        (tmp_path, f"is or holds the input {model}"),
        (Path("/"), f"is or holds the input {model}"),
        (file / "out", "cannot write"),
        (tmp_path / ("n" * 300), "cannot write"),
    ):
        err = told_in_one_line(cli("shard", model, "-o", out, "--overwrite"))
        assert reason in err, out
        assert str(out) in err
    assert content(tmp_path) == before
    assert link.is_symlink()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_format_writes_may_be_replaced(name: str, llama: Path, tmp_path: Path) -> None:
    method = {"bitsandbytes": "bnb", "eetq": "eetq"}.get(name, "rtn")
    qexport.quantize(llama, tmp_path / "out", spec_of(method=method, format=name))
    check_target(tmp_path / "out", overwrite=True)


def test_an_empty_directory_may_be_the_output(tmp_path: Path) -> None:
    model, out = small(tmp_path / "model"), tmp_path / "deep" / "er" / "out"
    out.mkdir(parents=True)
    qexport.shard(model, out)
    assert (out / "model.safetensors").is_file()
    assert hidden(out.parent) == []


@pytest.mark.parametrize("name", [".", "../here"])
@pytest.mark.parametrize("replace", [False, True])
def test_the_working_directory_as_output(
    tmp_path: Path, cli: RunCli, monkeypatch: pytest.MonkeyPatch, name: str, replace: bool
) -> None:
    """Replacing it would leave the user's shell in a directory that is no more."""
    model, here = small(tmp_path / "model"), tmp_path / "here"
    here.mkdir()
    if replace:
        small(here, {"old": torch.ones(1)})
    before = content(here)
    monkeypatch.chdir(here)
    result = cli("shard", model, "-o", name, "-q", *(["--overwrite"] if replace else []))
    assert "is or holds the working directory" in told_in_one_line(result)
    assert content(here) == before
    assert hidden(tmp_path) == []


def test_the_output_is_as_readable_as_any_new_file(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        qexport.shard(small(tmp_path / "model"), tmp_path / "out")
    finally:
        os.umask(mask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert modes == dict.fromkeys(["config.json", "model.safetensors", "qexport.json"], 0o640)


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError), StagedDirectory(tmp_path / "out") as staged:
        staged.path.write_text("cannot be")
    assert list(tmp_path.iterdir()) == []
    with StagedDirectory(tmp_path / "out"):
        pass  # without commit nothing appears either
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("event", [Noted, Started, Advanced, Finished])
def test_a_listener_that_fails_leaves_nothing_behind(tmp_path: Path, event: type[Event]) -> None:
    """As when whoever reads stderr goes away: `qexport shard ... 2>&1 | head -1`."""

    def fail(told: Event) -> None:
        if isinstance(told, event):
            raise BrokenPipeError

    model = small(tmp_path / "model")
    with pytest.raises(BrokenPipeError):
        qexport.shard(model, tmp_path / "out", ShardSpec(max_shard_size=10), on_event=fail)
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_replacement_killed_between_its_renames_is_undone(
    tmp_path: Path, cli: RunCli, overwrite: bool
) -> None:
    model, out = small(tmp_path / "model"), tmp_path / "out"
    aside = small(tmp_path / ".out.qexport-old-x1y2z3_0" / "content", {"old": torch.ones(1)})
    old = content(aside)
    if overwrite:
        assert cli("shard", model, "-o", out, "--overwrite", "-q") == (0, "", "")
        assert list(load_file(out / "model.safetensors")) == ["a"]
    else:
        assert "is there already" in told_in_one_line(cli("shard", model, "-o", out))
        assert content(out) == old
    assert hidden(tmp_path) == []


def test_a_replacement_killed_after_its_renames_is_finished(tmp_path: Path) -> None:
    model, out = small(tmp_path / "model"), small(tmp_path / "out", {"new": torch.ones(1)})
    small(tmp_path / ".out.qexport-old-x1y2z3_0" / "content", {"old": torch.ones(1)})
    before = content(out)
    with pytest.raises(OutputExistsError):
        qexport.shard(model, out)
    assert content(out) == before
    assert hidden(tmp_path) == []


def test_abandoned_work_is_cleared_and_living_work_is_not(tmp_path: Path) -> None:
    model, out = small(tmp_path / "model"), tmp_path / "out[1]*"
    names = [
        ".out[1]*.qexport-partial-dead0000",
        ".out[1]*.qexport-partial-living00",
        ".out1x.qexport-partial-dead0000",
        ".out.qexport-partial-dead0000",
    ]
    for name in names:
        (tmp_path / name).mkdir()
    lock = os.open(tmp_path / names[1], os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        qexport.shard(model, out)
        assert hidden(tmp_path) == sorted(names[1:]), "other outputs' work is not this one's"
    finally:
        os.close(lock)
    qexport.shard(model, out, overwrite=True)
    assert hidden(tmp_path) == sorted(names[2:])


def test_directories_of_other_people_are_left_alone(tmp_path: Path) -> None:
    model, out = small(tmp_path / "model"), tmp_path / "out"
    for name in (".out.qexport-old-2024", ".out.qexport-partial-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.txt").write_text("years of work")
    qexport.shard(model, out)
    assert hidden(tmp_path) == [".out.qexport-old-2024", ".out.qexport-partial-notes"]
    assert (tmp_path / ".out.qexport-old-2024" / "thesis.txt").read_text() == "years of work"


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file can become larger than `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("full_at", ["weights", "small files"])
def test_no_space_left(tmp_path: Path, cli: RunCli, full_at: str) -> None:
    model, out = small(tmp_path / "model", {"a": torch.zeros(40_000)}), tmp_path / "out"
    (model / "tokenizer.json").write_bytes(bytes(400_000))
    limit = 100_000 if full_at == "weights" else 300_000
    with limited(limit):
        err = told_in_one_line(cli("shard", model, "-o", out))
    assert err.startswith(f"error: no space left while writing {out}; nothing was written under that name")
    assert list(tmp_path.iterdir()) == [model]
    small(out, {"old": torch.ones(1)})
    before = content(out)
    with limited(limit):
        assert told_in_one_line(cli("shard", model, "-o", out, "--overwrite")) == err
    assert content(out) == before
    assert hidden(tmp_path) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_too_small_for_the_weights_is_told_first(tmp_path: Path, tiny_disk: Path, cli: RunCli) -> None:
    model = small(tmp_path / "model", {"a": torch.zeros(500_000)})
    err = told_in_one_line(cli("shard", model, "-o", tiny_disk / "out"))
    assert err == (
        f"error: {tiny_disk / 'out'} needs 2 MB, the disk has 1.05 MB free; "
        "free some space, or choose another place with -o\n"
    )
    assert list(tiny_disk.iterdir()) == []


def test_a_disk_that_becomes_full(tmp_path: Path, tiny_disk: Path, cli: RunCli) -> None:
    model = small(tmp_path / "model", {"a": torch.zeros(200_000)})
    (model / "tokenizer.json").write_bytes(bytes(400_000))
    err = told_in_one_line(cli("shard", model, "-o", tiny_disk / "out"))
    assert f"no space left while writing {tiny_disk / 'out'}" in err
    assert list(tiny_disk.iterdir()) == []


def test_a_read_only_disk(tmp_path: Path, tiny_disk: Path, cli: RunCli) -> None:
    model = small(tmp_path / "model")
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    err = told_in_one_line(cli("shard", model, "-o", tiny_disk / "out"))
    assert f"no permission to write {tiny_disk}" in err
    assert err.endswith("; choose another place with -o\n")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path, cli: RunCli) -> None:
    model, place = small(tmp_path / "model"), tmp_path / "place"
    place.mkdir(mode=0o500)
    assert "no permission to write" in told_in_one_line(cli("shard", model, "-o", place / "out"))
    assert list(place.iterdir()) == []


def test_what_can_be_told_at_once_is_told_before_the_weights_are_read(tmp_path: Path, cli: RunCli) -> None:
    """Hashing terabytes only to say that they do not fit, or that the output is there, takes hours."""
    size = shutil.disk_usage(tmp_path).free + 2 * 10**12
    model, out = small(tmp_path / "model"), tmp_path / "out"
    header = f'{{"a":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + size)
        except OSError as error:
            pytest.skip(f"no file with holes of that size can be made here: {error}")
    try:
        with within(20):
            err = told_in_one_line(cli("shard", model, "-o", out))
        assert f"{out} needs" in err
        small(out)
        with within(20):
            assert "is there already" in told_in_one_line(cli("shard", model, "-o", out))
    finally:
        (model / "model.safetensors").unlink()  # pytest keeps directories; what copies them may fill holes
    assert hidden(tmp_path) == []


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "qexport.json"
    write_file_atomically(path, "größe\n")
    assert path.read_bytes() == "größe\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_file_atomically(path, "new \ud800")
    assert path.read_bytes() == "größe\n".encode()
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="cannot write"):
        write_file_atomically(path, "x")
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_fails_takes_its_directories_back(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "m.gguf"
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert list(tmp_path.iterdir()) == []
    mask = os.umask(0o027)
    try:
        with whole_file(path) as file:
            file.write(b"whole")
            assert not path.exists()
    finally:
        os.umask(mask)
    assert content(tmp_path) == {"deep/er/m.gguf": b"whole"}
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_file_that_is_an_input_behind_links(tmp_path: Path) -> None:
    """As in the Hub's cache, whose snapshots are links to files elsewhere."""
    blob, model = tmp_path / "blobs" / "abc", tmp_path / "snapshot"
    blob.parent.mkdir()
    model.mkdir()
    blob.write_text("x")
    (model / "model.safetensors").symlink_to(blob)

    def check(target: Path, overwrite: bool = True) -> None:
        check_target_file(target, "text", lambda _: True, overwrite=overwrite, sources=[model])

    for target in (blob, blob.parent / ".." / "blobs" / "abc"):
        with pytest.raises(OutputExistsError, match="is a file of the input"):
            check(target)
    other = tmp_path / "other"
    check(other, overwrite=False)
    other.write_text("x")
    check(other)
    with pytest.raises(OutputExistsError, match="--overwrite"):
        check(other, overwrite=False)
    assert not (tmp_path / "deep").exists()
    check(tmp_path / "deep" / "er" / "new")
    assert not (tmp_path / "deep").exists(), "a check makes nothing"


def test_a_file_on_a_read_only_disk_is_refused_before_the_work(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StorageError, match=f"no permission to write {tiny_disk}"):
        check_target_file(tiny_disk / "deep" / "m.gguf", "text", lambda _: True)
