"""How Sphinx builds the documentation: `sphinx-build -W --keep-going docs build/docs`, without a network."""

import re
from typing import Any

from docutils import nodes

from abr_trainer import __version__

project = "ABR Trainer"
author = copyright = "ABR Trainer contributors"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
highlight_language = "none"  # for output and drawings; code says its language

html_theme = "furo"
html_title = "ABR Trainer"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False  # the Markdown lies in the repository

default_role = "code"  # `x` in docstrings is code
smartquotes = False  # "--flag" would get a long dash
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"  # ABRConfig would list 150 parameters
napoleon_use_ivar = True
autodoc_member_order = "bysource"
nitpicky = False


def keep_percent_signs(app: Any, doctree: nodes.document) -> None:
    """Let no line break come between a number and its percent sign."""
    for text in doctree.findall(nodes.Text):
        if not isinstance(text.parent, (nodes.literal, nodes.literal_block)) and " %" in text:
            text.parent.replace(text, nodes.Text(re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", text)))


def setup(app: Any) -> None:
    app.connect("doctree-read", keep_percent_signs)
