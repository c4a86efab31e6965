"""What distributions hold, and that what is installed from a wheel does what the documents say."""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


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
    beside = ("tests", "benchmarks", "docs", "examples")
    assert [name for name in files if name.startswith(beside)] == []


def copied(folder: Path, names: Sequence[str]) -> Path:
    """Copy files and folders of the checkout."""
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skipped)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the programs of a fresh environment that has a wheel of this package.

    What the package needs is that of the environment at hand.
    """
    pytest.importorskip("pip")
    place = tmp_path_factory.mktemp("wheel")
    source = copied(
        place / "source", ["prunegraph", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    )
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(source)]
    subprocess.run([*pip, *built], check=True, timeout=300)
    home = place / "home"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    paths = {"base": str(home), "platbase": str(home)}
    libraries = Path(sysconfig.get_path("purelib", "venv", vars=paths))
    (libraries / "others.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    programs = Path(sysconfig.get_path("scripts", "venv", vars=paths))
    (wheel,) = place.glob("*.whl")
    python = ["--python", str(programs / "python"), "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, *python, str(wheel)], check=True, timeout=300)
    shutil.rmtree(source)
    return programs


def run(words: Sequence[str | Path], folder: Path) -> str:
    """Run a program in a folder as a user would, without the checkout on its path."""
    hidden = {"PYTHONPATH", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"}
    variables = {name: value for name, value in os.environ.items() if name not in hidden}
    done = subprocess.run(
        words,
        cwd=folder,
        env=variables | {"MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_a_wheel_brings_the_package_and_its_command(installed: Path, tmp_path: Path) -> None:
    found = run([installed / "python", "-c", "import prunegraph as p; print(p.__file__)"], tmp_path)
    assert Path(found.strip()).is_relative_to(installed.parent)
    told = run([installed / "prunegraph", "inspect", "--arch", "torchvision:resnet50"], tmp_path)
    assert "conv1" in told


@pytest.mark.slow
def test_the_readme_runs_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    copied(tmp_path / "outside", ["tests", "docs", "README.md", "pyproject.toml"])
    tested = "tests/test_docs.py::test_the_blocks_of_a_page_run[README.md]"
    words = [installed / "python", "-I", "-m", "pytest", "-q", "-p", "no:cacheprovider", tested]
    assert "1 passed" in run(words, tmp_path / "outside")


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_from_a_wheel(path: Path, installed: Path, tmp_path: Path) -> None:
    example = Path(shutil.copy(path, tmp_path))
    run([installed / "python", example.name], tmp_path)
    assert sorted(tmp_path.iterdir()) == [example], "an example leaves files behind"
