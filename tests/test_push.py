"""Pushing to the Hub: huggingface_hub's real client over real HTTP, against a server on this machine."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from safetensors.torch import save_file

from qexport.checkpoint.manifest import MANIFEST_FILE, Manifest, Recipe, record_files
from qexport.checkpoint.resharding import shard
from qexport.checkpoint.staging import StagedDirectory, whole_file
from qexport.errors import (
    CheckpointNotFoundError,
    CorruptFileError,
    NotACheckpointError,
    SpecError,
    UnsafeFileError,
)
from qexport.events import Advanced, Event, Finished, Noted, Started
from qexport.publishing.contents import plan_push
from qexport.publishing.hub_client import HubError, Patience, StorageRefusedError
from qexport.publishing.options import check_options
from qexport.publishing.push import check_repo_id, push
from qexport.publishing.sending import THREADS
from qexport.publishing.spec import PushRecipe, PushSpec
from qexport.quantization.quantize import quantize
from qexport.report.content import Measure, Report, Row, Sample
from qexport.report.local_paths import without_local_paths
from qexport.report.page import page
from qexport.report.tables import report_markdown
from qexport.specs import ShardSpec, spec_of
from tests.conftest import RunCli
from tests.hub_server import TOKEN, HubServer

REPO = "me/model"
SOON = Patience(first_wait=0.001, longest_wait=0.01)
ONCE = Patience(attempts=1)
ROOT = Path(__file__).resolve().parents[1]
STORAGE = r"^/storage/"
# a shell's background jobs start with Ctrl-C ignored, and the tests may run in one
PUSH = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from qexport.cli.main import main; main(sys.argv[1:])"
)
_left: list[Any] = []  # what was begun and is not to be tidied up


@pytest.fixture(autouse=True)
def _this_machine_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A token of nobody's, no login of the developer's, and no request to the real Hub."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "no-login"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_TELEMETRY", True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


@pytest.fixture(scope="session")
def _made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("push") / "model"
    shard(llama, out, ShardSpec(max_shard_size="60KB"))
    (out / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return out


@pytest.fixture
def model(_made: Path, tmp_path: Path) -> Path:
    """A real output: several shards, tokenizer, manifest, model card."""
    return Path(shutil.copytree(_made, tmp_path / "model"))


def contents(directory: Path) -> dict[str, bytes]:
    """What is to arrive."""
    files = (file for file in sorted(directory.rglob("*")) if file.is_file())
    found = {file.relative_to(directory).as_posix(): file for file in files}
    return {
        name: _told(file) if name in (MANIFEST_FILE, "report.json") else file.read_bytes()
        for name, file in found.items()
    }


def _told(file: Path) -> bytes:
    told = without_local_paths(json.loads(file.read_bytes()))
    return (json.dumps(told, indent=2, ensure_ascii=False) + "\n").encode()


def recorded(directory: Path, **files: Any) -> Path:
    """A small output with a manifest."""
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    manifest = Manifest(Recipe("quantize", {}, {}), record_files(directory))
    (directory / MANIFEST_FILE).write_text(manifest.to_json())
    return directory


def renamed(**files: Any) -> dict[str, Any]:
    """Keyword arguments as file names: `a__gguf` is a.gguf."""
    return {name.replace("__", "."): content for name, content in files.items()}


def shards(directory: Path) -> list[Path]:
    found = sorted(directory.glob("*.safetensors"))
    assert len(found) > 2
    return found


# all of it arrives


@pytest.mark.parametrize("part_size", [None, 10_000])
def test_a_model_arrives_whole_in_one_commit(model: Path, part_size: int | None) -> None:
    events: list[Event] = []
    with HubServer(part_size=part_size) as hub:
        made = push(model, REPO, endpoint=hub.url, patience=SOON, on_event=events.append)
        repository = hub.repositories[REPO]
        assert hub.files(REPO) == contents(model)
    assert repository.private
    assert [commit.message for commit in repository.branches["main"]] == [
        "initial commit",
        "Push model with qexport",
    ]
    (pushed,) = made.revisions
    assert (made.repo_id, made.private, made.created) == (REPO, True, True)
    assert pushed.commit == repository.branches["main"][-1].oid
    assert pushed.sent_bytes == sum(file.stat().st_size for file in shards(model))
    assert not [event for event in events if isinstance(event, Noted)]

    started = [event for event in events if isinstance(event, Started)][-1]
    steps = [event.steps for event in events[events.index(started) :] if isinstance(event, Advanced)]
    assert sum(steps) == started.total == pushed.size_bytes == sum(map(len, contents(model).values()))
    assert isinstance(events[-1], Finished)

    # the token goes to the Hub and to nobody else
    assert not [one for one in hub.log if one.authorization and one.path.startswith("/storage/")]
    assert all(one.authorization == f"Bearer {TOKEN}" for one in hub.asked("POST", "^/api/"))
    puts = hub.asked("PUT", STORAGE)
    assert len(puts) == (len(shards(model)) if part_size is None else len({one.path for one in puts}))


def test_what_is_there_is_not_sent_again(model: Path, hub: HubServer) -> None:
    first = push(model, REPO)
    hub.log.clear()
    again = push(model, "model")  # the namespace is that of the token
    assert not hub.asked("PUT", "")
    assert not hub.asked("POST", "/commit/")
    (before,), (after,) = first.revisions, again.revisions
    assert (again.repo_id, after.commit, after.sent_bytes, after.changed) == (REPO, before.commit, 0, False)

    (model / "README.md").write_text("# Another card\n")  # cards are there to be edited
    changed = push(model, REPO, PushSpec(message="Another card"))
    assert hub.repositories[REPO].branches["main"][-1].message == "Another card"
    assert hub.files(REPO)["README.md"] == b"# Another card\n"
    assert changed.revisions[0].changed
    assert not hub.asked("PUT", "")


@pytest.mark.parametrize("private", [True, False])
def test_a_repository_keeps_its_visibility(model: Path, hub: HubServer, *, private: bool) -> None:
    hub.make(REPO, private=private, **renamed(old__gguf=b"GGUF"))
    events: list[Event] = []
    made = push(model, REPO, PushSpec(public=private), on_event=events.append)
    notes = [event.text for event in events if isinstance(event, Noted)]
    assert (made.private, made.created) == (private, False)
    assert hub.repositories[REPO].private is private
    assert not hub.asked("POST", "/repos/create")
    assert ("stays private" if private else "is public: everyone sees") in notes[0]
    assert f"{REPO} at main also has old.gguf: left as found" in notes[1]
    assert hub.files(REPO)["old.gguf"] == b"GGUF"


def test_public_is_public(model: Path, hub: HubServer) -> None:
    assert not push(model, REPO, PushSpec(public=True)).private
    assert not hub.repositories[REPO].private


def test_a_branch_is_made_without_what_main_holds(model: Path, hub: HubServer) -> None:
    hub.make(REPO, **renamed(old__txt=b"old"))
    made = push(model, REPO, PushSpec(revision="v2"))
    assert made.revisions[0].revision == "v2"
    assert hub.files(REPO, "v2") == contents(model)
    assert hub.files(REPO) == {"old.txt": b"old"}


@pytest.mark.skipif(importlib.util.find_spec("hf_xet") is None, reason="needs hf_xet")
def test_xet_sends_what_its_storage_lacks(model: Path, tmp_path: Path) -> None:
    (model / "big.txt").write_bytes(torch.randn(400_000).numpy().tobytes())

    def stored() -> int:
        return sum(file.stat().st_size for file in (tmp_path / "cas").rglob("default.*"))

    with HubServer(xet=tmp_path / "cas") as hub:
        (tmp_path / "cas").mkdir()
        made = push(model, REPO, endpoint=hub.url)
        tree = hub.repositories[REPO].branches["main"][-1].tree
        first = stored()
        assert not hub.asked("PUT", "")
        assert first > 1_600_000
        assert made.revisions[0].sent_bytes is None
        assert {path for path, file in tree.items() if file.lfs} == {
            "big.txt",
            *(file.name for file in shards(model)),
        }
        with (model / "big.txt").open("ab") as file:
            file.write(b"the end")
        push(model, REPO, endpoint=hub.url)
        assert hub.files(REPO)["big.txt"] == bytes(1_600_007)  # the size; the content lies in the storage
        assert stored() - first < 400_000


# what goes wrong on the way


def test_a_cut_connection_is_taken_up_again(model: Path, hub: HubServer) -> None:
    hub.fail("PUT", STORAGE, times=2, cut_after=100)
    hub.fail("POST", "/preupload/", cut_answer=True)
    hub.fail("POST", "/repos/create", cut_answer=True)
    hub.fail("GET", "/tree/", cut_answer=True)
    events: list[Event] = []
    push(model, REPO, patience=SOON, on_event=events.append)
    assert hub.files(REPO) == contents(model)
    notes = [event.text for event in events if isinstance(event, Noted)]
    said = re.compile(r"the connection broke off \(\w+\): tried again in \S+ s \([12] of 6\)")
    assert [bool(said.fullmatch(note)) for note in notes] == 5 * [True], notes
    steps = [event.steps for event in events if isinstance(event, Advanced) and event.what != "model"]
    assert sum(steps) == sum(map(len, contents(model).values()))
    assert min(steps) < 0  # what was sent in vain is taken back


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", r"/api/models/me/model$"),
        ("POST", "/repos/create"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", STORAGE),
        ("POST", "/lfs/verify"),
        ("POST", "/validate-yaml"),
        ("POST", "/commit/"),
        ("GET", "/tree/"),
    ],
)
def test_a_server_in_trouble_is_asked_again(model: Path, hub: HubServer, method: str, path: str) -> None:
    hub.fail(method, path, times=2, status=503)
    hub.fail(method, path, times=1, status=429, headers={"Retry-After": "0"})
    push(model, REPO, patience=SOON)
    assert hub.files(REPO) == contents(model)
    assert len(hub.repositories[REPO].branches["main"]) == 2


@pytest.mark.parametrize(("status", "attempts"), [(500, 4), (429, 4)])
def test_retries_end(model: Path, hub: HubServer, status: int, attempts: int) -> None:
    hub.fail("PUT", STORAGE, times=99, status=status)
    patience = Patience(attempts=attempts, first_wait=0.001, files_at_once=1)
    with pytest.raises(HubError, match=rf"\({status}\).*what was sent stays") as caught:
        push(model, REPO, patience=patience)
    assert caught.value.exit_code == 2
    assert len(hub.asked("PUT", STORAGE)) == attempts
    assert len(hub.repositories[REPO].branches["main"]) == 1


def test_the_other_files_under_way_stop_with_the_one_that_failed(model: Path, hub: HubServer) -> None:
    refused, *others = [hashlib.sha256(file.read_bytes()).hexdigest() for file in shards(model)]
    go_on = threading.Event()
    hub.fail("PUT", refused, times=9, status=400)
    hub.during_upload = lambda: go_on.wait(20)
    threading.Timer(0.3, go_on.set).start()
    with pytest.raises(StorageRefusedError):
        push(model, REPO, patience=Patience(attempts=1, files_at_once=2))
    assert THREADS not in {thread.name for thread in threading.enumerate()}
    assert len(hub.storage) <= 2 < len(others)
    assert hub.files(REPO) == {}


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "1"},
        {"RateLimit": '"api";r=0;t=1', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
    ],
)
def test_the_server_says_how_long_to_wait(model: Path, hub: HubServer, headers: dict[str, str]) -> None:
    hub.fail("POST", "/objects/batch", status=429, headers=headers)
    before = time.monotonic()
    push(model, REPO, patience=SOON)
    assert 1 <= time.monotonic() - before < 4


def test_a_server_that_wants_hours_is_not_waited_for(model: Path, hub: HubServer) -> None:
    hub.fail("PUT", STORAGE, times=9, status=429, headers={"Retry-After": "7200"})
    with pytest.raises(HubError, match=r"takes no more requests for 120 minutes"):
        push(model, REPO)


def test_a_link_to_the_storage_that_ran_out_is_asked_for_anew(model: Path, hub: HubServer) -> None:
    hub.fail("PUT", STORAGE, status=403)
    push(model, REPO)
    assert hub.files(REPO) == contents(model)
    shutil.rmtree(model)
    recorded(model, **renamed(a__gguf=b"GGUF of another"))
    hub.fail("PUT", STORAGE, times=9, status=403)
    with pytest.raises(StorageRefusedError, match=r"^the storage at \S+ refused a file \(403\)"):
        push(model, REPO)


def test_a_push_goes_on_where_it_was_cut(model: Path, hub: HubServer) -> None:
    one_by_one = Patience(attempts=1, files_at_once=1)
    failure = hub.fail("PUT", STORAGE, times=0, cut_after=100)
    hub.during_upload = lambda: setattr(failure, "times", 99)  # all after the first are cut
    with pytest.raises(HubError, match=r"the connection to 127\.0\.0\.1:\d+ failed .*; push again: what was"):
        push(model, REPO, patience=one_by_one)
    assert hub.files(REPO) == {}
    (there,) = hub.storage
    hub.log.clear()
    failure.times, hub.during_upload = 0, lambda: None
    made = push(model, REPO, patience=one_by_one)
    assert hub.files(REPO) == contents(model)
    assert there not in {one.path.split("/")[2] for one in hub.asked("PUT", STORAGE)}
    sizes = sum(file.stat().st_size for file in shards(model))
    assert made.revisions[0].sent_bytes == sizes - len(hub.storage[there])


def test_a_commit_whose_answer_got_lost_is_not_made_twice(model: Path, hub: HubServer) -> None:
    hub.fail("POST", "/commit/", cut_answer=True)
    made = push(model, REPO, patience=SOON)
    commits = hub.repositories[REPO].branches["main"]
    assert len(commits) == 2
    assert made.revisions[0].commit == commits[-1].oid
    assert len(hub.asked("POST", "/commit/")) == 1


def test_a_commit_that_the_server_did_not_make_is_made_again(model: Path, hub: HubServer) -> None:
    hub.fail("POST", "/commit/", status=504)
    hub.fail("POST", "/commit/", status=409, message="A commit has happened since")
    push(model, REPO, patience=SOON)
    assert hub.files(REPO) == contents(model)
    assert len(hub.repositories[REPO].branches["main"]) == 2


def test_what_the_server_lost_is_told(model: Path, hub: HubServer) -> None:
    hub.loses = "tokenizer.json"
    with pytest.raises(HubError, match=r"after the push, me/model at main lacks tokenizer\.json"):
        push(model, REPO, patience=SOON)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_push_commits_nothing_and_goes_on(model: Path, hub: HubServer, number: int) -> None:
    hanging, go_on, lock = threading.Event(), threading.Event(), threading.Lock()
    first: set[int] = set()  # the threads of two files that arrive; any other stays half way

    def hang() -> None:
        with lock:
            if len(first) < 2:
                first.add(threading.get_ident())
        if threading.get_ident() in first and len(hub.storage) < 2:
            return
        while len(hub.storage) < 2 and not go_on.wait(0.01):
            pass
        hanging.set()
        go_on.wait(30)

    hub.during_upload = hang
    environment = {
        **os.environ,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }
    with subprocess.Popen(
        [sys.executable, "-c", PUSH, "push", str(model), REPO],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert hanging.wait(60)
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert hub.files(REPO) == {}
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number
        assert err == (
            "note: the push stopped; the same command goes on from there\n"
            "error: interrupted; nothing unfinished was left behind\n"
        )
    go_on.set()
    hub.during_upload = lambda: None
    there = set(hub.storage)
    hub.log.clear()
    push(model, REPO)
    assert hub.files(REPO) == contents(model)
    assert not there & {one.path.split("/")[2] for one in hub.asked("PUT", STORAGE)}


# who may


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (
            401,
            r"does not accept the token \(401: no \*\*\*\); a token that is valid; log in with: hf auth",
        ),
        (403, r"no right to write to me/model \(403: no \*\*\*\); a token with write access to it; make one"),
        (404, r"has no me/model, or the token may not see it \(404: no \*\*\*\)"),
        (413, r"127\.0\.0\.1:\d+ answered 413: no \*\*\*\n"),
    ],
)
def test_refusals_are_told_in_one_line(
    model: Path, hub: HubServer, cli: RunCli, status: int, told: str
) -> None:
    hub.fail("POST", "/preupload/", status=status, message=f"no {TOKEN}\n")
    code, out, err = cli("push", model, REPO)
    assert (code, out) == (2, "")
    assert re.search(told, err)
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_no_right_to_make_a_repository(model: Path, cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(may_write=False) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        code, _, err = cli("push", model, "others/model")
        assert code == 2
        assert "no right to write to others/model (403: You don't have the rights to create" in err
        assert not hub.repositories
        hub.make(REPO)  # one may read it only
        code, _, err = cli("push", model, REPO)
        assert code == 2
        assert "no right to write to me/model (403: You don't have the required permissions, ***)" in err
        assert not hub.asked("PUT", "")


def test_no_token(model: Path, hub: HubServer, cli: RunCli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert cli("push", model, REPO) == (
        2,
        "",
        "error: no token for the Hub; one with write access; log in with: hf auth login, or set HF_TOKEN\n",
    )
    login = Path(huggingface_hub.constants.HF_TOKEN_PATH)
    login.parent.mkdir()
    login.write_text(TOKEN + "\n")  # as `hf auth login` leaves it
    assert cli("push", model, REPO, "--quiet") == (0, "", "")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
    code, _, err = cli("push", model, REPO)
    assert code == 2
    assert "does not accept the token (401" in err
    assert "x" * 34 not in err


def test_no_server_and_no_network(model: Path, monkeypatch: pytest.MonkeyPatch, cli: RunCli) -> None:
    with pytest.raises(HubError, match=r"the connection to 127\.0\.0\.1:9 failed 3 times \(.*refused"):
        push(model, REPO, endpoint="http://127.0.0.1:9", patience=Patience(attempts=3, first_wait=0.001))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = cli("push", model, REPO)
    assert (code, err) == (
        2,
        "error: huggingface_hub is offline (HF_HUB_OFFLINE); unset HF_HUB_OFFLINE to push\n",
    )


REPO_IDS = [
    *("model", "me/model", "Me_1/a.b-c", "a b", "../x", "a/b/c", "", "me/", "/x", "-a/b", "a/b.", "a--b"),
    *("a..b", "me/x.git", "https://huggingface.co/me/x", "x" * 97, "me/ü", "a\nb", "me/x\n"),
]


@pytest.mark.parametrize("name", REPO_IDS)
def test_repository_ids_as_huggingface_hub_takes_them(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError:
        with pytest.raises(SpecError, match=r"is no repository id; NAME or NAMESPACE/NAME"):
            check_repo_id(name)
    else:
        check_repo_id(name)


def test_the_token_is_nowhere(model: Path, hub: HubServer, cli: RunCli, tmp_path: Path) -> None:
    told = [
        cli("push", model, REPO),
        cli("push", model, REPO, "--json"),
        cli("push", model, REPO, "--dry-run"),
    ]
    for status in (401, 403, 404, 409, 400):
        hub.fail("POST", "/preupload/", status=status, message=f"your token is {TOKEN}, Bearer {TOKEN}")
        told.append(cli("push", model, REPO))
    assert [code for code, _, _ in told] == [0, 0, 0, 2, 2, 2, 2, 2]
    assert TOKEN not in repr(told)
    assert "signature" not in repr(told)  # links to the storage are secrets too
    assert not [
        file for file in tmp_path.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()
    ]
    assert TOKEN not in "".join(map(repr, hub.files(REPO).values()))


# what goes


def test_a_dry_run_asks_nobody(
    model: Path, cli: RunCli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    code, out, err = cli("push", model, REPO, "--dry-run", "--exclude", "*.jinja", "--exclude", "*.log")
    assert code == 0
    rows = [line.split("\t") for line in out.splitlines()[1:]]
    assert [row[1] for row in rows] == [name for name in contents(model) if not name.endswith(".jinja")]
    assert {row[0] for row in rows} == {"main"}
    assert err.splitlines()[0] == "note: --exclude '*.log' matches nothing"
    assert re.fullmatch(rf"{len(rows)} files, \S+ \w+ would go to me/model", err.splitlines()[-1])
    assert cli("push", model, "a b", "--dry-run")[0] == 2


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """What compare leaves: variants, two GGUF ones among them, scores, a report."""
    out = tmp_path / "several"
    for name, content in (("bnb-4bit", b"a"), ("hqq-3bit", b"b")):
        tensors = {"w": torch.full((64,), float(content[0]))}
        (out / "made").mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / "made" / "m.safetensors")
        weights = (out / "made" / "m.safetensors").read_bytes()
        shutil.rmtree(out / "made")
        recorded(
            out / name, **renamed(config__json="{}", model__safetensors=weights, README__md=f"# {name}\n")
        )
    for kind in ("q4_k_m", "q8_0"):
        files = {
            f"m-{kind.upper()}.gguf": b"GGUF" + kind.encode(),
            "Modelfile": f"FROM ./m-{kind.upper()}.gguf\n",
            "LICENSE": "free\n",
        }
        recorded(out / f"gguf-{kind}", **files)
    (out / "scores").mkdir()
    (out / "scores" / "full.json").write_text("{}")
    (out / "report.html").write_text("<html></html>")
    (out / "README.md").write_text("# All\n")
    return out


def test_branches_have_a_variant_each(several: Path, hub: HubServer) -> None:
    made = push(several, REPO, PushSpec(layout="branches"), patience=SOON)
    names = ["bnb-4bit", "gguf-q4_k_m", "gguf-q8_0", "hqq-3bit"]
    assert [pushed.revision for pushed in made.revisions] == [*names, "main"]
    for name in names:
        assert hub.files(REPO, name) == contents(several / name)
        assert len(hub.repositories[REPO].branches[name]) == 2
    assert set(hub.files(REPO)) == {"report.html", "README.md"}


def test_one_tree_has_gguf_files_side_by_side(several: Path, hub: HubServer) -> None:
    made = push(several, REPO, PushSpec(layout="subfolders"), patience=SOON)
    files = hub.files(REPO)
    assert len(made.revisions) == 1
    assert len(hub.repositories[REPO].branches["main"]) == 2
    assert {path for path in files if "/" not in path} == {
        "README.md",
        "report.html",
        "m-Q4_K_M.gguf",
        "m-Q8_0.gguf",
        "Modelfile.m-Q4_K_M",
        "Modelfile.m-Q8_0",
    }
    for kind in ("Q4_K_M", "Q8_0"):  # a Modelfile names what lies beside it
        named = re.search(r"FROM \./(\S+)", files[f"Modelfile.m-{kind}"].decode())
        assert named
        assert files[named[1]] == b"GGUF" + kind.lower().encode()
        assert {f"gguf-{kind.lower()}/{name}" for name in ("LICENSE", MANIFEST_FILE)} <= set(files)
    assert files["bnb-4bit/model.safetensors"] == (several / "bnb-4bit" / "model.safetensors").read_bytes()
    assert not [path for path in files if path.startswith("scores")]


def test_gguf_files_of_the_same_name_stay_apart(several: Path) -> None:
    recorded(
        several / "gguf-other", **renamed(**{"M-q8_0__gguf": b"GGUF", "Modelfile": "FROM ./M-q8_0.gguf"})
    )
    plan = plan_push(several, PushSpec(layout="subfolders"))
    paths = {item.path_in_repo for item in plan.uploads[0].items}
    assert {"m-Q4_K_M.gguf", "Modelfile.m-Q4_K_M"} <= paths
    assert {"gguf-other/M-q8_0.gguf", "gguf-other/Modelfile", "gguf-q8_0/m-Q8_0.gguf"} <= paths
    (several / "gguf-q8_0" / "Modelfile.m-Q4_K_M").write_text("mine")
    (several / "gguf-q8_0" / "m-Q8_0.gguf").rename(several / "gguf-q8_0" / "n-Q8_0.gguf")
    (several / "gguf-q8_0" / MANIFEST_FILE).unlink()
    with pytest.raises(SpecError, match=r"would both be Modelfile\.m-Q4_K_M in the repository"):
        plan_push(several, PushSpec(layout="subfolders"))


def test_a_variant_of_one_name(several: Path, hub: HubServer, cli: RunCli) -> None:
    code, out, _ = cli("push", several, REPO, "--variant", "hqq-3bit")
    assert code == 0
    assert hub.files(REPO) == contents(several / "hqq-3bit")
    assert re.search(r"/me/model \(private\)\nmain: 4 files, .* of large files sent; commit \w{12}\n$", out)
    plan = plan_push(several, PushSpec(variant=("hqq-3bit", "gguf-q8_0"), layout="branches"))
    assert [upload.revision for upload in plan.uploads] == ["gguf-q8_0", "hqq-3bit", None]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, r"holds 4 variants \(bnb-4bit, gguf-q4_k_m, gguf-q8_0 and 1 more\); --layout branches"),
        ({"variant": "q9"}, r"there is no variant 'q9'; known are bnb-4bit, gguf-q4_k_m"),
        ({"layout": "branches", "revision": "x"}, "--revision with --layout branches"),
        ({"layout": "subfolders", "revision": "a b"}, "--revision 'a b' is no name that a branch"),
        ({"layout": "subfolders", "exclude": "*"}, "--exclude leaves nothing to push"),
    ],
)
def test_options_that_do_not_fit(several: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        plan_push(several, PushSpec.model_validate(options))


def test_a_push_of_models_to_be_made_is_checked_without_them() -> None:
    models = ("rtn-4bit", "main")
    check_options(PushRecipe(repo_id=REPO, variant=("rtn-4bit",), layout="branches"), models)
    check_options(PushRecipe(repo_id=REPO, revision="v2"), models)
    for told, options in (
        ("'bad..name' is no name that a branch can have", {"revision": "bad..name"}),
        ("--revision with --layout branches", {"revision": "v2", "layout": "branches"}),
        ("variant 'main' has a name that a branch of its own cannot have", {"layout": "branches"}),
        ("no variant 'rtn-3bit'; known are rtn-4bit, main", {"variant": ["rtn-3bit"]}),
    ):
        with pytest.raises(SpecError, match=told):
            check_options(PushRecipe.model_validate({"repo_id": REPO, **options}), models)


def test_names_that_no_branch_can_have(several: Path) -> None:
    for name in ("main", "a b", "x..y"):
        (several / "hqq-3bit").rename(several / name)
        with pytest.raises(SpecError, match=rf"the variant {name!r} has a name that a branch"):
            plan_push(several, PushSpec(layout="branches"))
        (several / name).rename(several / "hqq-3bit")


def test_one_output_is_no_directory_of_several(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="--layout is for a directory of several variants"):
        plan_push(model, PushSpec(layout="branches"))
    with pytest.raises(SpecError, match="--variant is for a directory of several variants"):
        plan_push(model, PushSpec(variant=("x",)))
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACheckpointError, match="holds no output"):
        plan_push(tmp_path / "empty", PushSpec())
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        plan_push(tmp_path / "nowhere", PushSpec())


# what does not go


def test_what_is_not_whole_is_refused(model: Path, hub: HubServer) -> None:
    broken = shards(model)[1]
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CorruptFileError, match=rf"is not whole: {broken.name} is gone or changed"):
        push(model, REPO)
    broken.unlink()
    with pytest.raises(CorruptFileError, match=rf"is not whole: {broken.name} is gone or changed"):
        push(model, REPO)
    assert not hub.log


def test_without_a_manifest_it_is_told(model: Path) -> None:
    (model / MANIFEST_FILE).unlink()
    plan = plan_push(model, PushSpec())
    assert plan.notes == ("model has no qexport.json: that it is whole could not be proved",)
    cut = shards(model)[0]
    whole = cut.read_bytes()
    cut.write_bytes(whole[:-1])
    with pytest.raises(CorruptFileError, match=re.escape(cut.name)):
        plan_push(model, PushSpec())
    cut.unlink()
    with pytest.raises(CorruptFileError, match=rf"names {cut.name}, not there"):
        plan_push(model, PushSpec())


def test_what_came_in_since_is_told(model: Path) -> None:
    (model / "picture.png").write_bytes(b"\x89PNG")
    assert plan_push(model, PushSpec()).notes == (
        "model: picture.png: not recorded in qexport.json, pushed as found",
    )


REFUSED: dict[str, bytes | Callable[[Path], None]] = {
    ".env": b"A=1",
    "hf_token.txt": b"x",
    "sub/id_rsa": b"x",
    "server.pem": b"x",
    "my-credentials.json": b"{}",
    ".git/config": b"x",
    "__pycache__/a.pyc": b"x",
    ".cache/huggingface/x": b"x",
    "optimizer.pt": b"x",
    "rng_state_0.pth": b"x",
    "trainer_state.json": b"{}",
    "checkpoint-500/config.json": b"{}",
    "extra.bin": b"x",
    "old.pkl": b"x",
    "notes.txt": b"a\nb hf_" + b"abcdefgHIJKLMNOP0123456789qrstuvwx",
    "run.sh": b"export KEY=sk-proj-abcDEF0123456789abcdef01",
    "ci.yaml": b"token: ghp_" + b"a1B2" * 9,
    "aws.cfg": b"AKIAABCDEFGHIJKLMNOP",
    "k.txt": b"-----BEGIN OPENSSH PRIVATE KEY-----\n",
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "dangling": lambda path: path.symlink_to("nothing"),
    "folder": lambda path: path.symlink_to("/etc"),
    "pipe": os.mkfifo,
    "bell\a.txt": b"x",
}


@pytest.mark.parametrize("name", REFUSED)
def test_secrets_and_caches_are_refused(model: Path, name: str) -> None:
    content = REFUSED[name]
    (model / name).parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        (model / name).write_bytes(content)
    else:
        content(model / name)
    with pytest.raises(UnsafeFileError, match="nothing of this kind goes to the Hub; take it away") as caught:
        plan_push(model, PushSpec())
    line = str(caught.value)
    assert "\n" not in line
    assert not isinstance(content, bytes) or len(content) < 9 or content.decode().split()[-1] not in line
    if name != "bell\a.txt":
        pattern = re.search(r"--exclude '([^']+)'", line)  # the remedy leads somewhere
        assert pattern
        assert not [
            item
            for upload in plan_push(model, PushSpec(exclude=(pattern[1],))).uploads
            for item in upload.items
            if item.path_in_repo == name
        ]


def test_the_users_own_token_is_found_in_any_form(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-old-token")
    (model / "log.txt").write_text("logged in with an-old-token")
    with pytest.raises(UnsafeFileError, match=r"log\.txt holds your Hugging Face token") as caught:
        push(model, REPO)
    assert "an-old" not in str(caught.value)


def test_what_only_looks_like_a_secret_goes(model: Path) -> None:
    names = ("special_tokens_map.json", "added_tokens.json", "tokenizer.model", "tokenization_x.py")
    text = "task-specific sk-learn-style-hyphenated-words hf_hub_download hf_transfer"
    for name in names:
        (model / name).write_text(text)
    going = {item.path_in_repo for item in plan_push(model, PushSpec()).uploads[0].items}
    assert set(names) <= going


def test_what_a_killed_run_left_does_not_go(model: Path, several: Path) -> None:
    for out in (model, several, several / "hqq-3bit"):
        # as a kill leaves them: entered, and never left
        _left.append(StagedDirectory(out / "rtn-4bit"))
        (_left[-1].path / "x").write_bytes(b"x")
        for name in ("report.html", "a.gguf"):
            _left.append(whole_file(out / name))
            _left[-1].__enter__()
    left = [file.name for file in model.iterdir() if file.name.startswith(".")]
    assert len(left) == 3
    for directory, options in ((model, {}), (several, {"layout": "subfolders"})):
        spec = PushSpec.model_validate(options)
        with pytest.raises(UnsafeFileError, match=r"is a cache or work under way") as caught:
            plan_push(directory, spec)
        assert str(caught.value).count("--exclude '.") == 3
    (upload,) = plan_push(model, PushSpec(exclude=tuple(left))).uploads
    whole = {name for name in contents(model) if not name.startswith(".")}
    assert {item.path_in_repo for item in upload.items} == whole


def test_beside_several_only_the_report_goes(several: Path) -> None:
    (several / "private" / "deep").mkdir(parents=True)
    (several / "private" / "deep" / "notes.txt").write_text("mine")
    (several / "notes.txt").write_text("mine")
    (several / ".env").write_text("A=1")  # goes nowhere: nothing to refuse
    _left.append(StagedDirectory(several / "rtn-4bit"))
    _left.append(whole_file(several / "report.html"))
    _left[-1].__enter__()
    (several / "bnb-4bit" / "loss_vs_bits.png").write_bytes(b"PNG")
    for name in ("loss_vs_bits.png", "report.md", "loss_vs_size.svg"):
        (several / name).write_text("")
    for layout in ("subfolders", "branches"):
        plan = plan_push(several, PushSpec.model_validate({"layout": layout}))
        going = {item.path_in_repo for upload in plan.uploads for item in upload.items}
        assert {"report.html", "README.md", "loss_vs_bits.png", "report.md", "loss_vs_size.svg"} <= going
        assert not [path for path in going if "notes" in path or path.startswith((".", "scores"))]
        (note,) = plan.notes  # our own plot beside a variant is no news
        assert re.fullmatch(r"\.env, \.report\.html\.\w{8}, .* and 2 more: no part of .*, left behind", note)


def test_a_pickle_that_qexport_wrote_goes(tmp_path: Path) -> None:
    made = recorded(tmp_path / "hqq", **renamed(config__json="{}", qmodel__pt=b"PK"))
    assert plan_push(made, PushSpec()).notes == (
        "qmodel.pt: a pickle that qexport wrote; the Hub warns its readers",
    )


def test_several_findings_are_told_together(model: Path) -> None:
    for name in (".env", "a.pem", "b.pem", "c.pem"):
        (model / name).write_text("x")
    with pytest.raises(
        UnsafeFileError, match=r"\.env may be a secret, a\.pem may be .* and 1 more; .*'a\.pem'"
    ):
        plan_push(model, PushSpec())
    plan_push(model, PushSpec(exclude=(".env", "*.pem")))


def test_where_files_lay_on_a_disk_stays_there(llama: Path, tmp_path: Path, hub: HubServer) -> None:
    out = tmp_path / "out"
    quantize(llama, out, spec_of("rtn"))
    assert str(llama) in (out / MANIFEST_FILE).read_text()  # the card wants to know it
    push(out, REPO, patience=SOON)
    told = json.loads(hub.files(REPO)[MANIFEST_FILE])
    assert told["figures"]["sources"] == [{"path": llama.name}]
    assert not [path for path, content in hub.files(REPO).items() if str(tmp_path).encode() in content]
    assert told["files"] == json.loads((out / MANIFEST_FILE).read_text())["files"]
    # and the next push sees that nothing changed
    assert not push(out, REPO, patience=SOON).revisions[0].changed


def test_no_text_of_ours_tells_where_anything_lay(
    several: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = several.parent
    data, base = f"{home}/my data/held <out>.jsonl", f"{home}/secret/base"
    told = [f"hf:{base}", "../secret/base", f"file://{base}", data, "~/secret/base", "C:\\secret\\base"]
    rows = [
        Row(
            variant=name,
            path=path,
            method="rtn",
            bits=4,
            bits_per_weight=4.5,
            size_bytes=9,
            perplexity=Measure(value=3.0),
            failures=(f"is not as good as {base}, by far",),
        )
        for name, path in (("full", base), ("bnb-4bit", "bnb-4bit"))
    ]
    report = Report(
        qexport="0",
        title=f"what {base} costs",
        verdict=f"Nothing (of {base}) was lost; see http://host/a/page, read/write.",
        rows=tuple(rows),
        samples=(Sample(prompt="Where is /etc/hosts?", reference=None, answers={"full": "/etc/hosts"}),),
        recipes={"perplexity": {"text": data, "tried": told}},
        recipe_lines=(f"text={data}: {home}/secret/x", *told),
    )
    monkeypatch.setattr("qexport.report.page._vega", lambda: f"'{base}'")
    (several / "report.json").write_text(report.model_dump_json())
    (several / "report.md").write_text(report_markdown(report))
    (several / "report.html").write_text(page(report).replace(f"'{base}'", "1"))
    (several / "loss_vs_bits.svg").write_text(f"<svg><title>{data.replace('<', '&lt;')}</title></svg>")
    section = f"<!-- qexport:begin -->\nof {base}\n<!-- qexport:end -->\n"
    (several / "hqq-3bit" / "README.md").write_text(f"# Mine, {home}/x\n{section}")
    before = {file: file.read_bytes() for file in several.rglob("*") if file.is_file()}
    assert sum(b"secret" in content for content in before.values()) == 4
    for layout in ("subfolders", "branches"):
        events: list[Event] = []
        push(several, REPO, PushSpec.model_validate({"layout": layout}), on_event=events.append)
        notes = [event.text for event in events if isinstance(event, Noted)]
        assert not [note for note in notes if "tells a path of this machine" in note]
    for branch in hub.repositories[REPO].branches:
        for path, content in hub.files(REPO, branch).items():
            if path.endswith("README.md"):
                content = content.replace(f"# Mine, {home}/x".encode(), b"# Mine")  # the user's word
            assert str(home).encode() not in content, path
            assert b"secret" not in content, path
    files = hub.files(REPO)
    assert b"host/a/page, read/write." in files["report.md"]
    assert json.loads(files["report.json"])["samples"][0]["prompt"] == "Where is /etc/hosts?"
    assert files["report.html"].count(b"/etc/hosts") >= 2
    assert b"base costs" in files["report.html"]
    assert b"held &lt;out&gt;.jsonl" in files["report.html"]
    assert {file: file.read_bytes() for file in before} == before


def test_a_path_in_words_of_others_is_told(model: Path, hub: HubServer) -> None:
    (model / "notes.md").write_text(f"made with: cd {model} && make")
    (model / "other.md").write_text(f"made in {model}-2")
    told = [note for note in plan_push(model, PushSpec()).notes if "machine" in note]
    assert told == [f"notes.md tells a path of this machine, {model}: pushed as found"]


def test_a_recipe_pushes_what_passes_the_gate(
    llama: Path,
    text: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    hub: HubServer,
    cli: RunCli,
) -> None:
    recipe = {
        "base": str(llama),
        "output": str(tmp_path / "out"),
        "quantize": [{"method": "rtn", "bits": [8, 2]}],
        "verify": {"text": str(text), "max_documents": 12, "window": 32, "max_loss": "5%"},
        "push": {"repo_id": REPO, "variant": "rtn-8bit"},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    code, _, stderr = cli("export", file)
    assert code == 1
    assert "nothing was pushed: rtn-2bit did not pass the gate" in stderr
    assert REPO not in hub.repositories
    file.write_text(json.dumps({**recipe, "quantize": [{"method": "rtn", "bits": 8}]}))
    code, _, stderr = cli("export", file)
    assert code == 0, stderr
    files = hub.files(REPO)
    assert {"README.md", "report.html", "report.json", "rtn-8bit/model.safetensors"} <= set(files)
    home = str(tmp_path_factory.getbasetemp()).encode()
    assert not [path for path, content in files.items() if home in content]
    data: Any = ModelCard(files["README.md"].decode()).data
    assert (data.library_name, "8-bit" in data.tags) == ("transformers", True)
    assert {result.metric_name for result in data.eval_results or ()} >= {"Perplexity, rtn-8bit"}


def test_a_recipes_push_is_checked_before_anything_runs(
    llama: Path, text: Path, tmp_path: Path, cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "base": str(llama),
        "output": str(tmp_path / "out"),
        "quantize": [{"method": "rtn"}],
        "verify": {"text": str(text)},
    }
    file = tmp_path / "recipe.yaml"
    for push_part, pattern in (
        ({"repo_id": "a b"}, "'a b' is no repository id"),
        ({"repo_id": REPO, "variant": "rtn-5bit"}, "push.variant: there is no rtn-5bit, known are rtn-4bit"),
        ({"repo_id": REPO, "publik": True}, "unknown key 'push.publik'; did you mean 'public'?"),
        ({"public": True}, "the key 'push.repo_id' is missing"),
        ({"repo_id": REPO}, "no token for the Hub"),
    ):
        if push_part == {"repo_id": REPO}:
            monkeypatch.delenv("HF_TOKEN")
        file.write_text(json.dumps({**recipe, "push": push_part}))
        code, stdout, stderr = cli("export", file)
        assert (code, stdout) == (2, "")
        assert pattern in stderr.splitlines()[-1]
        assert not (tmp_path / "out").exists()
