"""How Sphinx builds the documentation: ``make docs``."""

import re
from typing import Any

from docutils import nodes
from matplotlib.figure import Figure
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx_gallery.scrapers import figure_rst

import prunegraph
from prunegraph.cli.main import COMMANDS, load
from prunegraph.runs.options.help import options_of, summary_of

project = "prunegraph"
author = "the prunegraph authors"
copyright = "the prunegraph authors, MIT licence"
release = version = prunegraph.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_gallery.gen_gallery",
]
html_theme = "furo"
html_title = f"prunegraph {release}"
html_show_sourcelink = False
html_copy_source = False
highlight_language = "none"
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
smartquotes_action = "D"  # dashes, no curly quotes
python_maximum_signature_line_length = 88
autodoc_member_order = "groupwise"
autodoc_mock_imports = ["flwr"]  # an extra
napoleon_custom_sections = ["Shapes"]
napoleon_attr_annotations = False  # signatures show the types
napoleon_use_rtype = False
napoleon_use_ivar = True
suppress_warnings = ["config.cache"]  # the gallery's settings hold a function


def figures_of_the_package(_: object, variables: dict[str, Any], settings: dict[str, Any]) -> str:
    """Save the figure that a block of an example ends with, such as ``result.plot()``."""
    names = variables["example_globals"]
    figure, names["___"] = names.get("___"), None  # what the last expression gave
    if not isinstance(figure, Figure):
        return ""
    path = next(variables["image_path_iterator"])
    figure.savefig(path, dpi=120)
    return str(figure_rst([path], settings["src_dir"]))


sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\.py$",  # all of them run
    "run_stale_examples": True,  # it is the package that changes
    "image_scrapers": ("matplotlib", figures_of_the_package),
    "capture_repr": (),
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
}


class CommandReference(SphinxDirective):
    """Every command with its options, as its own ``--help-all`` prints them."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each command."""
        lines = []
        for name, command in COMMANDS.items():
            kind = load(command.options)
            lines += [f"## {name}", "", summary_of(kind), ""]
            for option in options_of(kind):
                lines += [f"`{option.name} {option.value}`".replace(" `", "`"), f": {option.text}"]
                lines.append("")
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def skip_repeated(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any
) -> bool | None:
    """Document a name once, under the shortest one that it has."""
    elsewhere = what == "module" and app.env.docname != "reference/prunegraph"
    return True if elsewhere and name in prunegraph.__all__ else None


def link_examples(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Lead links to a script of the repository to its page of the gallery."""
    source[0] = re.sub(r"\.\./examples/(\w+)\.py\)", r"gallery/\1.rst)", source[0])


def setup(app: Sphinx) -> None:
    """Register what is defined here."""
    app.connect("source-read", link_examples)
    app.add_directive("prunegraph-commands", CommandReference)
    app.connect("autodoc-skip-member", skip_repeated)
