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


def escape(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the bars of norms, |W|, from being read as substitutions of reStructuredText."""
    lines[:] = [line if line.lstrip().startswith(">>>") else line.replace("|", r"\|") for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape)
