"""What a source distribution holds."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def listed(root: Path, egg_base: Path) -> set[str]:
    """Return the files that setuptools would put into a source distribution of a project."""
    code = "import setuptools, sys; setuptools.setup(script_args=sys.argv[1:])"
    words = ["--quiet", "egg_info", "--egg-base", str(egg_base)]
    subprocess.run([sys.executable, "-c", code, *words], cwd=root, check=True, timeout=120)
    return set((egg_base / "prunegraph.egg-info" / "SOURCES.txt").read_text().splitlines())


def test_a_source_distribution_holds_the_package_and_no_test(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    files = listed(ROOT, tmp_path)
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "prunegraph").rglob("*.py")}
    assert sources <= files
    assert {"prunegraph/policies/resnet-cifar.safetensors", "LICENSE", "README.md"} <= files
    assert [name for name in files if name.startswith(("tests", "benchmarks", "docs"))] == []
