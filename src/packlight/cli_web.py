"""The command `packlight web`: parse, call, print."""

import json
from pathlib import Path
from typing import Annotated

import typer

from packlight.terminal import progress_bar


def web(
    bundle: Annotated[Path, typer.Argument(readable=False)],
    images: Annotated[Path, typer.Option(readable=False, help="Folder of pictures to search.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the site.")],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "",
    example: Annotated[list[str] | None, typer.Option(help="Words to try with one click; may be repeated.")] = None,
    runtime: Annotated[
        Path | None, typer.Option(readable=False, help="Folder of onnxruntime-web; without it, it is downloaded once.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write a static site that searches pictures by words, all of it computed in the browser. Needs no PyTorch."""
    from packlight.serve import open_served
    from packlight.web import Page, site_text, write_site

    page = Page(title, tuple(example or ()), runtime)
    made = write_site(open_served(bundle), images, out, page, progress_bar(as_json))
    for sentence in made.wrong:
        typer.echo(f"packlight: {sentence}", err=True)
    values = {**vars(made), "path": str(made.path)}
    typer.echo(json.dumps(values, ensure_ascii=False, indent=1) if as_json else site_text(made))
    raise typer.Exit(2 if made.wrong else 0)
