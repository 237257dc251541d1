"""`slicecli verify`: check a slice against its record."""

from __future__ import annotations

import dataclasses
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show

if TYPE_CHECKING:
    from slicecli.hub.inspection import Inspection


@click.command("verify")
@click.argument("subject", type=shared.MODEL, metavar="DIR|REPO")
@click.option(
    "--download", is_flag=True, help="Download all of REPO and hash it, instead of trusting the Hub's hashes."
)
@click.option("--revision", type=shared.TEXT, metavar="REV", help="Branch, tag or commit on the Hub.")
@shared.token_option
@shared.format_option
@click.pass_context
def command(
    ctx: click.Context, subject: str, download: bool, revision: str | None, token: str | None, output_format: str
) -> None:
    """Check that the slice in DIR, or in REPO on the Hub, matches its record.

    The checks cover the record itself, the hash of every file, unrecorded files, the numbers of parameters and bytes,
    the config and the card, and that no file contains a token or local path. The exit code is 1 if anything differs.
    From REPO only small files are downloaded.

    \b
    Examples:
      slicecli verify ./my-slice
      slicecli verify me/my-slice --format json
    """
    from slicecli.hub.verify import CHECKS, verify_contents

    contents = _look_at(subject, download, revision, token, ctx.obj["quiet"])
    findings = verify_contents(contents, [token] if token else [])
    differences = Counter(one.check for one in findings if one.is_error)
    if output_format == "json":
        show.print_json(
            {
                "subject": contents.name,
                "ok": not differences,
                "files": len(contents.sizes),
                "checks": {name: differences[name] for name in CHECKS},
                "findings": [dataclasses.asdict(one) for one in findings],
            }
        )
    else:
        for one in findings:
            show.result(f"{'' if one.is_error else 'note, '}{one.check}: {one.text}")
        count = differences.total()
        said = f"{count} difference{'' if count == 1 else 's'}" if count else "nothing differs"
        made = "" if contents.faults else f" {len(contents.sizes)} files, {', '.join(CHECKS[:-1])} and {CHECKS[-1]}:"
        show.result(f"{contents.name}:{made} {said}.")
    ctx.exit(1 if differences else 0)


def _look_at(subject: str, download: bool, revision: str | None, token: str | None, is_quiet: bool) -> Inspection:
    """Look at what is in a folder or a repository."""
    from slicecli.errors import RequestError
    from slicecli.hub.inspection import inspect_folder
    from slicecli.hub.verify import examine_repository
    from slicecli.runtime.inputs import describe_shadow, find_folder

    folder = find_folder(subject)
    if folder is not None and (download or revision is not None):
        raise RequestError(
            f"{subject!r} is a folder.", f"Leave out --download and --revision. {describe_shadow(subject)}".strip()
        )
    with nullcontext() if is_quiet else show.progress(False) as watcher:
        if folder is not None:
            return inspect_folder(folder, watcher)
        return examine_repository(subject, revision, token, download, watcher)
