"""Sphinx: the pages are Markdown, and are copied beside the HTML as they are."""

from pathlib import Path
from shutil import copy
from typing import Any

project = "task tags"
author = "the authors of task tags"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "task tags"
html_extra_path = ["llms.txt", "openapi.json"]
html_copy_source = False
myst_heading_anchors = 3
myst_heading_slug_func = "tools.reference.slug"
myst_enable_extensions = ["colon_fence"]


def copy_pages(app: Any, error: Exception | None) -> None:
    """Copy each page as Markdown, so that /quickstart.md is there beside /quickstart.html."""
    if error is None and app.builder.name == "html":
        for name in app.env.found_docs:
            copy(app.env.doc2path(name), Path(app.outdir, f"{name}.md"))


def setup(app: Any) -> None:
    app.connect("build-finished", copy_pages)
