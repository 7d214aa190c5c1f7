"""A hook of mkdocs: each notebook is a page, its cells in order, what they said and drew below them. Nothing is run."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

PICTURES = {"image/svg+xml": "svg", "image/png": "png"}


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add page and pictures of every notebook; the notebook itself stays, to be downloaded."""
    from mkdocs.structure.files import File  # here: the tests read the pages without the docs' extra

    for source in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(source.src_uri)
        text, pictures = page(json.loads(source.content_string), path.stem)
        files.append(File.generated(config, str(path.with_suffix(".md")), content=text))
        for name, data in pictures.items():
            files.append(File.generated(config, str(path.with_name(name)), content=data))
    return files


def on_page_markdown(markdown: str, **more: Any) -> str:
    """Links go to the notebook, as a reader of the repository needs them; on the site they go to its page.

    Example:
        >>> on_page_markdown("[five minutes](notebooks/pipeline.ipynb)")
        '[five minutes](notebooks/pipeline.md)'
    """
    return re.sub(r"\]\((notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)


def page(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, bytes]]:
    """Markdown, and pictures by file name; `alt` in a cell's metadata says what its picture shows."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source))  # as in `on_page_markdown`
            continue
        parts.append(f"```python\n{source}\n```")
        for kind, data in outputs(cell):
            if kind in PICTURES:
                name = f"{stem}-{number}.{PICTURES[kind]}"
                pictures[name] = data.encode() if kind.startswith("image/svg") else base64.b64decode(data)
                parts.append(f"![{cell['metadata']['alt']}]({name})")
            else:
                parts.append(f"```output\n{data.rstrip()}\n```")
    first, *rest = parts
    return "\n\n".join([first, f"*[This page as a notebook]({stem}.ipynb).*", *rest]) + "\n", pictures


def outputs(cell: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The richest form of each output of a code cell: (kind, data)."""
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            yield "text/plain", "".join(output["text"])
        elif "data" in output:
            kind = next(kind for kind in (*PICTURES, "text/plain") if kind in output["data"])
            yield kind, "".join(output["data"][kind])
