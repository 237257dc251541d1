"""`slicecli push`: publish a slice on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show
from slicecli.errors import RequestError, SlicecliError
from slicecli.hub.options import PushOptions
from slicecli.runtime.options import from_chosen

if TYPE_CHECKING:
    from slicecli.hub.push import Publication


@click.command("push")
@click.argument("folder", metavar="DIR", type=shared.LocalPath(exists=True, file_okay=False))
@click.argument("repository", type=shared.REPOSITORY, metavar="REPO")
@shared.push_options
@shared.add_options(PushOptions, "revision")
@shared.token_option
@click.option("--dry-run", is_flag=True, help="Check the slice, list the files to send, and stop.")
@shared.format_option
@click.pass_obj
def command(
    context: dict[str, Any],
    /,
    folder: Path,
    repository: str,
    dry_run: bool,
    output_format: str,
    **chosen: Any,
) -> None:
    """Publish the slice in DIR as REPO on the Hugging Face Hub.

    Before the upload the slice is checked: it must be complete, its files must match its record, and none may contain
    a token or local path. After the upload the repository is compared with the folder. Files that the Hub already has
    are not sent again.

    \b
    Examples:
      slicecli push ./my-slice me/my-slice --dry-run
      slicecli push ./my-slice me/my-slice --private
    """
    from slicecli.hub.push import check_publishable

    settings = from_chosen(PushOptions, chosen)
    if not dry_run:
        print_publication(push(folder, repository, settings, context["quiet"]), output_format, context["quiet"])
        return
    files = check_publishable(folder, settings)
    if output_format == "json":
        show.print_json({"repository": repository, "files": files, "bytes": sum(files.values()), "dry_run": True})
        return
    show.print_table(["file", "size"], [[name, show.size(count)] for name, count in files.items()])
    show.result(f"{len(files)} files, {show.size(sum(files.values()))}, would be pushed to {repository}.")


def push(folder: Path, repository: str, settings: PushOptions, is_quiet: bool) -> Publication:
    """Push a slice, with the bars of the Hub's client in a terminal only."""
    import sys

    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    from slicecli.hub.push import push_slice

    if is_quiet or not sys.stderr.isatty():
        disable_progress_bars()
    return push_slice(folder, repository, settings)


def publication_of(chosen: Mapping[str, Any], repository: str | None) -> PushOptions:
    """Return how a new slice is published; refuse options of publishing without a repository.

    The revision among the chosen options is that of the model.
    """
    publication = from_chosen(PushOptions, chosen, leave_out=["revision"])
    if repository is None and publication != PushOptions(token=publication.token):
        raise RequestError("--private, --create-pr and --commit-message require --push.", "Add --push REPO.")
    return publication


def push_and_report(
    folder: Path,
    repository: str | None,
    settings: PushOptions,
    is_quiet: bool,
    fields: dict[str, Any],
    report: Callable[[dict[str, Any]], None],
) -> Publication | None:
    """Push a new slice if a repository is named, and report its fields with what became of that."""
    if repository is None:
        report(fields)
        return None
    try:
        published = push(folder, repository, settings, is_quiet)
    except SlicecliError:
        report({**fields, "published": None})
        raise
    report({**fields, "published": publication_fields(published)})
    return published


def publication_fields(publication: Publication) -> dict[str, Any]:
    """Return a publication as plain data."""
    return {
        "repository": publication.repository,
        "url": publication.url,
        "commit": publication.commit,
        "pull_request": publication.pull_request,
        "files": publication.files,
        "bytes": sum(publication.files.values()),
    }


def print_publication(publication: Publication, output_format: str, is_quiet: bool) -> None:
    """Say what was published where."""
    if output_format == "json":
        show.print_json(publication_fields(publication))
        return
    size = show.size(sum(publication.files.values()))
    show.result(f"{publication.repository}: {len(publication.files)} files, {size}, {publication.url}")
    if not is_quiet:
        show.note("Compared the Hub with the folder, file by file: nothing differs.")
