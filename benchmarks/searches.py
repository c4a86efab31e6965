"""What benchmarks that search share: options of ``prunegraph train``, a file of finished rows."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from prunegraph.core.files import write_json
from prunegraph.runs.options.config import TrainConfig
from prunegraph.runs.options.yaml_file import differences, parse, to_dict
from prunegraph.runs.parallel.machine import keep_freed_memory
from prunegraph.runs.report.report import machine

GRADIENTS = ("taylor", "rank_taylor", "mean_taylor")
TWINS = ("twin_similarity", "twin_rank")
"""Features of a channel that a variant may not read."""


def read_rows(path: Path) -> dict[str, Any]:
    """Return what is finished: a file's content, or one without rows."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"rows": {}}


def begin(path: Path, words: list[str], **asked: Any) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the options, and the content of a file that was made with the same ones or is new.

    Args:
        path: the file; the program ends if it was made with other options.
        words: options of ``prunegraph train``.
        asked: further options that its rows depend on.
    """
    if path.suffix != ".json":
        sys.exit(f"{path}: --out names a JSON file; what its rows rest on lies in a folder beside")
    if path.with_suffix("").is_dir() and not path.is_file():
        sys.exit(f"{path.with_suffix('')} is of a file that is not there: delete the folder")
    content = read_rows(path)
    options = parse(TrainConfig, words)
    assert isinstance(options, TrainConfig)
    keep_freed_memory()
    torch.set_num_threads(options.threads or 1)
    if "command" in content:
        before = parse(TrainConfig, shlex.split(content["command"]))
        assert before is not None
        odd = differences(options, to_dict(before))
        odd += [key for key, value in asked.items() if content.get(key, value) != value]
        if odd:
            sys.exit(f"{path} was made with other options: {odd[0]}; name another file")
    content |= asked | {"command": shlex.join(words), "machine": machine()}
    write_json(path, content)
    return options, content
