"""``prunegraph verify``: a run, or a folder of several comparisons with their summary."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from prunegraph.core.console import Console
from prunegraph.core.errors import ArtefactError
from prunegraph.core.reading import checked, read_json
from prunegraph.runs.comparisons import check_same_dense, folder_names, summarise
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.options.compare import CompareConfig, ComparisonsConfig
from prunegraph.runs.options.tools import VerifyConfig
from prunegraph.runs.options.yaml_file import differences, load_config, to_dict
from prunegraph.runs.verify.run import verify_run


def run_verify(config: VerifyConfig, console: Console) -> dict[str, Any]:
    """Check a run folder or several comparisons, print what was checked and return it.

    Raises:
        ArtefactError: a file is damaged, or a figure is wrong; the message names it.
    """
    folder = RunFolder(path=config.run)
    if not folder.file(RunFolder.SUMMARY).is_file():
        return verify_run(config, console)
    path, options = folder.file(RunFolder.SUMMARY), folder.file(RunFolder.CONFIG)
    content = checked(read_json(path), {"comparisons": list[dict[str, Any]]}, str(path))
    entries = [
        checked(entry, {"folder": str, "arch": str}, str(path)) for entry in content["comparisons"]
    ]
    parts = load_config(ComparisonsConfig, options).comparisons()
    if len(entries) != len(parts):
        msg = f"{path} lists {len(entries)} comparisons, but {options} asks for {len(parts)}"
        raise ArtefactError(msg)
    expected = folder_names(parts, [entry["arch"] for entry in entries])
    for entry, name in zip(entries, expected, strict=True):
        if entry["folder"] != name:
            msg = f"{path} calls a comparison {entry['folder']!r} that is to be {name!r}"
            raise ArtefactError(msg)
    members = [RunFolder(path=folder.inside(name)) for name in expected]
    results = _verify_members(config, parts, members, options.name, console)
    check_same_dense(parts, members)
    if summarise(members) != content:
        msg = f"{path} is not what the reports of its comparisons say: give the command again"
        raise ArtefactError(msg)
    unknown = [
        f"{member.path.name}/{name}" if name.startswith(f"{RunFolder.CELLS}/") else name
        for member, result in zip(members, results, strict=True)
        for name in result["not_verifiable"]
    ]
    console.say(f"{len(members)} comparisons of {folder.path} and their summary are right")
    return {
        "command": config.command,
        "run": str(folder.path),
        "figures": sum(result["figures"] for result in results),
        "files": sum(result["files"] for result in results),
        "same_machine": all(result["same_machine"] for result in results),
        "not_verifiable": list(dict.fromkeys(unknown)),
    }


def _verify_members(
    config: VerifyConfig,
    parts: Sequence[CompareConfig],
    members: Sequence[RunFolder],
    asked: str,
    console: Console,
) -> list[dict[str, Any]]:
    """Check that each comparison is the one that was asked for, and its figures."""
    results = []
    for part, member in zip(parts, members, strict=True):
        made = load_config(CompareConfig, member.file(RunFolder.CONFIG))
        found = differences(part, to_dict(made))
        if found:
            msg = f"{member.path} is not what {asked} asks for: {found[0]}"
            raise ArtefactError(msg)
        results.append(verify_run(dataclasses.replace(config, run=member.path), console))
    return results
