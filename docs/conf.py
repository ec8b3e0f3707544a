"""How Sphinx builds the documentation: `sphinx-build -W --keep-going docs build/docs`, without a network."""

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
html_copy_source = False  # so the site stays half as large: the Markdown lies in the repository
html_show_sphinx = False

autodoc_typehints = "description"
autodoc_member_order = "bysource"
nitpicky = False
