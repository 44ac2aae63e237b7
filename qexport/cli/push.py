"""`qexport push`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from qexport.cli.options import make_spec, spec_options
from qexport.cli.output import Output, output_options
from qexport.publishing.spec import PushSpec
from qexport.sizes import format_size


@click.command(short_help="Push an output, or several variants, to the Hugging Face Hub.")
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repo_id")
@spec_options(PushSpec)
@click.option("--dry-run", is_flag=True, help="list what would go, and where to; asks no network")
@output_options
def push(directory: Path, repo_id: str, dry_run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Push DIRECTORY to the repository REPO_ID (NAMESPACE/NAME) on the Hub.

    DIRECTORY is a model, an adapter or GGUF files that qexport wrote, or holds several as export and compare
    write them. The token is HF_TOKEN's, or that of `hf auth login`. An interrupted push goes on where it was
    when the same command is given again: files that the Hub has are not sent twice, the commit comes last.

    Refused are outputs that are not whole, secrets, caches and foreign pickles.
    """
    spec = make_spec(PushSpec, given, "push")
    out = Output(as_json, quiet)
    if dry_run:
        _show_plan(directory, repo_id, spec, out)
        return
    from qexport.publishing.push import push as run

    with out.listening() as on_event:
        result = run(directory, repo_id, spec, on_event=on_event)
    lines = [f"{result.url} ({'private' if result.private else 'public'})"]
    for made in result.revisions:
        state = f"commit {made.commit[:12]}" if made.changed else "was there already"
        sent = "" if made.sent_bytes is None else f", {format_size(made.sent_bytes)} of large files sent"
        size = format_size(made.size_bytes)
        lines.append(f"{made.revision}: {made.files} file{'s' * (made.files != 1)}, {size}{sent}; {state}")
    out.result(asdict(result), "\n".join(lines))


def _show_plan(directory: Path, repo_id: str, spec: PushSpec, out: Output) -> None:
    from qexport.publishing.contents import plan_push
    from qexport.publishing.push import check_repo_id

    check_repo_id(repo_id)
    with out.listening() as on_event:
        plan = plan_push(directory, spec, on_event=on_event)
    for note in plan.notes:
        out.note(f"note: {note}")
    files = [
        {
            "revision": upload.revision or "main",
            "path_in_repo": item.path_in_repo,
            "size_bytes": item.size,
            "file": str(item.path),
        }
        for upload in plan.uploads
        for item in upload.items
    ]
    rows = [
        (str(f["revision"]), str(f["path_in_repo"]), format_size(float(str(f["size_bytes"])))) for f in files
    ]
    content = {"repo_id": repo_id, "files": files, "size_bytes": plan.size_bytes, "notes": list(plan.notes)}
    out.table("dry run", ("revision", "path in the repository", "size"), rows, content)
    if not out.json:
        out.note(f"{len(files)} files, {format_size(plan.size_bytes)} would go to {repo_id}")
