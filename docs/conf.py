"""How Sphinx builds the documentation: ``make docs``."""

import contextlib
import io
import os
import re
from dataclasses import fields
from typing import Any, get_args

import tyro
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import prunegraph
from prunegraph.cli.main import COMMANDS, load, main

project = "prunegraph"
author = "the prunegraph authors"
copyright = "the prunegraph authors, MIT licence"
release = version = prunegraph.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
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
napoleon_custom_sections = ["Shapes"]
napoleon_attr_annotations = False  # signatures show the types
napoleon_use_rtype = False
napoleon_use_ivar = True


class CommandReference(SphinxDirective):
    """Every command with its options, as its own ``--help`` prints them."""

    def run(self) -> list[nodes.Node]:
        """Return a section for each command."""
        lines = []
        for name, command in COMMANDS.items():
            config = load(command.options)
            usage, description, options = read_help(name)
            hidden = get_args(tyro.conf.Suppress[int])[1]
            shown = [f for f in fields(config) if hidden not in get_args(f.type)[1:]]
            if len(options) != len(shown):
                msg = f"`prunegraph {name} --help` was not understood: {[o for o, _ in options]}"
                raise self.error(msg)
            lines += [f"## {name}", "", description, "", "```", usage, "```", ""]
            for option, text in options:
                lines += [f"`{option}`", f": {text}", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def read_help(name: str) -> tuple[str, str, list[tuple[str, str]]]:
    """Return usage, description and (option, meaning) pairs of a command."""
    os.environ["COLUMNS"] = "2000"  # no line of it is broken
    printed = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(printed):
        main([name, "--help"])
    printed.seek(0)
    head, *boxes = re.split(r"^╭.*$", printed.read(), flags=re.MULTILINE)
    usage, _, description = head.strip().removeprefix("usage: ").partition("\n")
    inside = "\n".join(
        line[2:-1].rstrip() for line in "".join(boxes).splitlines() if line[:1] == "│"
    )
    options = []
    for entry in re.split(r"^(?=\S)", inside, flags=re.MULTILINE)[1:]:
        option, text = re.split(r"\s{2,}|\n\s*", entry.strip(), maxsplit=1)
        text = re.sub(r"\s*\(default: (None|False)?\)", "", text)
        if option != "-h, --help":
            options.append((option.replace("{None}|", ""), text))
    return usage, description.strip(), options


def skip_repeated(
    app: Sphinx, what: str, name: str, obj: object, skip: bool, options: Any
) -> bool | None:
    """Document a name once, under the shortest one that it has."""
    elsewhere = what == "module" and app.env.docname != "reference/prunegraph"
    return True if elsewhere and name in prunegraph.__all__ else None


def setup(app: Sphinx) -> None:
    """Register what is defined here."""
    app.add_directive("prunegraph-commands", CommandReference)
    app.connect("autodoc-skip-member", skip_repeated)
