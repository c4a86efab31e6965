"""What the README and the pages of the documentation show works as it stands there.

The blocks of a page run one after the other, in one folder. A command runs by the real command
line, with the sizes of ``TINY`` put over its own. A ``text`` block after one that ran is its
output: each line has to occur in it, in this order. Comments say what is not so::

    <!-- not run: REASON -->     the code is compiled, the options of commands and benchmarks parsed
    <!-- file: NAME.py -->       the code is written to this file
"""

import argparse
import contextlib
import importlib
import io
import pkgutil
import re
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import prunegraph
from prunegraph.cli.main import COMMANDS, load, main
from prunegraph.core.errors import ConfigError
from prunegraph.methods.registry import method_names
from prunegraph.runs.options.config import TrainConfig
from prunegraph.runs.options.yaml_file import option_names, parse

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"(?:^<!-- (?P<marker>[^\n]*) -->\n)?^```(?P<kind>[^\n`]*)\n(?P<code>.*?)^```$", re.M | re.S
)
LAB = ROOT / "docs" / "lab"
"""Frozen pages, whose commands are those of older commits."""
PAGES = [
    ROOT / "README.md",
    *(page for page in sorted((ROOT / "docs").rglob("*.md")) if LAB not in page.parents),
]
OURS = re.compile(r"^(prunegraph|python )", re.M)
TINY = {
    "networks": 20,
    "agent.update_size": 2,
    "agent.surrogate_steps": 2,
    "agent.distill_steps": 1,
    "agent.subset": 64,
    "calibration_images": 64,
    "epochs": 1,
    "finetune_epochs": 1,
    "search_seeds": 1,
    "seeds": 1,
    "baselines": "none",
    "threads": 1,
    "workers": 1,
}
"""Option -> value that keeps a command to a few seconds."""
FEWER = {"--rounds": "2", "--randomized.candidates": "2", "--randomized.steps": "5"}
"""The same for options of single methods, where a page gives them."""


BENCHMARK_PACKAGES = {
    "diffusers",
    "monai",
    "segmentation_models_pytorch",
    "timm",
    "torch_pruning",
    "transformers",
    "ultralytics",
}
"""What the extras ``benchmark`` and ``zoo`` install; without them some options are not parsed."""


class Block(NamedTuple):
    """A fenced block of a page."""

    kind: str
    code: str
    marker: str


def blocks_of(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(item["kind"], item["code"], item["marker"] or "") for item in found]


def commands_of(code: str) -> list[list[str]]:
    """Return the words of each line of a shell block, without comments."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def arguments_of(words: Sequence[str]) -> list[str] | None:
    """Return what the words of a line say to the command line; None if they run another program."""
    if words[:2] == ["python", "train_agent.py"]:
        return ["train", *words[2:]]
    return list(words[1:]) if words[0] == "prunegraph" else None


SEARCHES = ("agent", "cem", "random_search")
"""Methods of ``prune`` on the pages that take ``--networks`` and the agent's options."""


def tiny(arguments: Sequence[str]) -> list[str]:
    """Return the arguments with the options of ``TINY`` that the command takes."""
    if arguments[0] not in COMMANDS or "--help" in arguments:
        return list(arguments)
    names = option_names(load(COMMANDS[arguments[0]].options))
    sizes = {name: value for name, value in TINY.items() if name in names}
    if arguments[0] == "prune" and arguments[1] not in SEARCHES:
        sizes = {n: v for n, v in sizes.items() if n != "networks" and not n.startswith("agent")}
    if "--policy" in arguments and "networks" in sizes:
        sizes["networks"] = 28  # it decides with some
    if "--budgets" in arguments:
        sizes["networks"] = 37  # each cell of a family has its own starts
    others = {"--weights", "--config"}  # trained before
    trains = arguments[0] != "inspect" and "pretrain_epochs" in names
    if trains and not others & set(arguments):
        sizes["pretrain_epochs"] = TINY["epochs"]
    options = [(f"--{name.replace('_', '-')}", str(value)) for name, value in sizes.items()]
    options += [(name, value) for name, value in FEWER.items() if name in arguments]
    return [*arguments, *(word for option in options for word in option)]


def run_commands(code: str) -> None:
    for words in commands_of(code):
        arguments = arguments_of(words)
        assert arguments is not None, f"{words[0]} cannot be run here: mark the block as not run"
        assert main(tiny(arguments)) == 0, words


class Parsed(Exception):  # no error
    """Ends a benchmark when its options are read; holds those that it hands on to ``train``."""


def check_benchmark(words: Sequence[str]) -> None:
    """Let a benchmark read its options, and no more."""
    read = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, *given: Any, **options: Any) -> Any:
        raise Parsed(read(self, *given, **options)[1])

    folder = ROOT / "benchmarks"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", stop)
        patch.setattr(sys, "argv", list(words))
        patch.syspath_prepend(folder)
        try:
            runpy.run_path(str(folder / Path(words[0]).name), run_name="__main__")
        except Parsed as parsed:
            (rest,) = parsed.args
        except ModuleNotFoundError as error:
            assert error.name in BENCHMARK_PACKAGES
            return
    assert parse(TrainConfig, rest) is not None


def check_only(block: Block) -> None:
    """Compile code that is not run, and parse the options of commands."""
    if block.kind == "python":
        compile(block.code, "block", "exec")
        return
    for words in commands_of(block.code):
        arguments = arguments_of(words)
        if arguments is not None:
            assert parse(load(COMMANDS[arguments[0]].options), arguments[1:]) is not None
        elif words[0] == "python":
            check_benchmark(words[1:])


def assert_printed(expected: str, output: str) -> None:
    """Assert that each line occurs in the output, in this order, whatever its spaces are."""
    rest = " ".join(output.split())
    for line in expected.splitlines():
        words = " ".join(line.split())
        before, found, rest = rest.partition(words)
        assert found, f"the page shows {words!r}, printed was {before!r}"


def run_page(blocks: Sequence[Block], folder: Path) -> None:
    namespace: dict[str, Any] = {}
    output: str | None = None
    for block in blocks:
        if block.kind == "text":
            if output is not None:
                assert_printed(block.code, output)
        elif block.marker.startswith("file: "):
            (folder / block.marker.removeprefix("file: ")).write_text(block.code, encoding="utf-8")
        elif block.kind in ("python", "bash") and block.marker.startswith("not run: "):
            check_only(block)
        elif block.kind in ("python", "bash"):
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                if block.kind == "bash":
                    run_commands(block.code)
                else:
                    exec(compile(block.code, "block", "exec"), namespace)
            output = printed.getvalue()
            continue
        output = None


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return an empty current folder; modules that are imported from it are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(
    "page",
    PAGES,
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_the_blocks_of_a_page_run(page: Path, workplace: Path) -> None:
    blocks = blocks_of(page)
    run_page(blocks, workplace)
    shown = [block.code for block in blocks if not block.kind and OURS.search(block.code)]
    assert shown == [], "commands that are not checked: call the block `bash`"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```bash\nprunegraph --help\n```\n```text\nusage: nothing\n```\n", "usage: nothing"),
        ("```python\nprint(1)\n```\n```text\n2\n```\n", "the page shows '2'"),
        ("```bash\npip install x\n```\n", "mark the block as not run"),
        ("```bash\nprunegraph inspect --arch nosuch\n```\n", "inspect"),
    ],
)
def test_a_wrong_page_fails(page: str, message: str, workplace: Path) -> None:
    path = workplace / "page.md"
    path.write_text(page, encoding="utf-8")
    with pytest.raises(AssertionError, match=message):
        run_page(blocks_of(path), workplace)


def test_options_of_commands_that_are_not_run_are_checked(workplace: Path) -> None:
    block = Block("bash", "prunegraph train --keep-mac 0.5\n", "not run: it takes hours")
    with pytest.raises(ConfigError, match="unknown option"):
        run_page([block], workplace)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("python benchmarks/ablations.py --out a.json --keep-mac 0.5", ConfigError),
        ("python benchmarks/ablations.py --seeds 3", SystemExit),
        ("python benchmarks/nosuch.py", FileNotFoundError),
    ],
)
def test_options_of_benchmarks_that_are_not_run_are_checked(
    command: str, error: type[BaseException], workplace: Path
) -> None:
    block = Block("bash", f"{command}\n", "not run: it takes hours")
    with pytest.raises(error):
        run_page([block], workplace)


def test_every_public_package_is_in_the_reference() -> None:
    packages = {item.name for item in pkgutil.iter_modules(prunegraph.__path__) if item.ispkg}
    public = {name for name in packages if (ROOT / "docs" / "reference" / f"{name}.md").is_file()}
    private = packages - public
    modules = [importlib.import_module(f"prunegraph.{name}") for name in sorted(private)]
    assert [module.__name__ for module in modules if hasattr(module, "__all__")] == []


def test_every_method_is_on_the_page_of_comparisons() -> None:
    page = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    parts = {part for name in method_names() for part in name.split("/")}
    assert sorted(part for part in parts if f"`{part}`" not in page) == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")))
def test_an_example_is_short_and_has_a_title(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    assert lines[0] == '"""'
    assert lines[2] == "=" * len(lines[1])


def anchors_of(page: Path) -> set[str]:
    """Return what GitHub and MyST call the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Return the links of a page that lead to no file of the repository, or to no heading."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    found = []
    for link in re.findall(r"(?<=\]\()[^)\s]+|(?<=src=\")[^\"]+", text):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if "://" not in link and not (
            target.exists() and (not anchor or anchor in anchors_of(target))
        ):
            found.append(link)
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"])
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `b`\n[a](#one-b) [b](#two) [c](no.md) [d](https://x) ![e](page.md#one)\n"
    )
    assert broken_links(page) == ["#two", "no.md", "page.md#one"]
