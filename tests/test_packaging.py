"""What a wheel holds: code, texts, the embedded model; not the maker of the texts."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_wheel_holds_what_the_package_needs(tmp_path: Path) -> None:
    # from a copy: building in place leaves a build/ directory behind
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("qexport-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = {f"qexport/{file.relative_to(ROOT / 'qexport')}" for file in (ROOT / "qexport").rglob("*.py")}
    needed |= {f"qexport/calibration/{name}.jsonl" for name in ("calibration", "heldout", "pairs")}
    needed |= {
        "qexport/calibration/SOURCES.md",
        "qexport/embedded/demo.yaml",
        "qexport/embedded/base/model.safetensors",
        "qexport/embedded/base/chat_template.jinja",
        "qexport/embedded/adapter/adapter_model.safetensors",
        "qexport/py.typed",
        "qexport/report/templates/page.html.jinja",
        "qexport/report/templates/page.css",
        "qexport/report/templates/page.js",
        "qexport/report/templates/card.md.jinja",
    }
    assert needed <= names
    assert not [name for name in names if "/make/" in name]
