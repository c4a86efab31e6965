"""What ``prunegraph`` says at once, without the seconds that torch takes: commands and version."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

SUMMARIES = {
    "pretrain": "train a network, from scratch or on",
    "train": "train the agent, prune, fine-tune, compare",
    "apply": "prune a network with a trained policy",
    "compare": "compare with every baseline, fine-tuned",
    "inspect": "print groups, costs, and what is frozen",
    "export": "write the pruned network as ONNX, torch.export, safetensors",
    "verify": "check every figure of a run from its files",
}
"""A line about each command."""


def answer(words: Sequence[str]) -> str | None:
    """Return the answer to words that name no command: all commands, or the version.

    Args:
        words: those after ``prunegraph``.
    """
    name = words[0] if words else "--help"
    if name in ("-h", "--help", "help"):
        return _overview()
    if name == "--version":
        return f"prunegraph {_version()}\n"
    return None


def _overview() -> str:
    width = max(map(len, SUMMARIES))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in SUMMARIES.items())
    return (
        f"usage: prunegraph COMMAND [options]\n\n{commands}\n\n"
        "`prunegraph COMMAND --help` lists the options of a command.\n"
    )


def _version() -> str:
    try:
        return version("prunegraph")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "(not installed)"
