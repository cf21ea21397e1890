"""Settings of the documentation site: `sphinx-build -W docs build/docs`.

Sphinx with MyST and not another generator: readers of PyTorch projects know its pages, ours stay plain Markdown that
GitHub shows too, the API reference comes from the docstrings, and -W makes every warning (a broken link, a page in no
table of contents, a docstring that does not render) an error.
"""

from typing import Any

project = "structlin"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "structlin"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them
napoleon_custom_sections = ["Source"]


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Make reStructuredText of a docstring as ours are written.

    The bars of norms, |W|, are no substitutions, and "Source: Author year." in one line is a section.
    """
    result: list[str] = []
    for line in lines:
        if line.startswith("Source: "):
            result += ["", "Source:", f"    {line.removeprefix('Source: ')}"]
        else:
            result.append(line if line.lstrip().startswith(">>>") else line.replace("|", r"\|"))
    lines[:] = result


def setup(app: Any) -> None:
    """Run before napoleon, which reads the sections."""
    app.connect("autodoc-process-docstring", plain, priority=400)
