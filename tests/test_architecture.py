"""The structure that docs/design.md promises, read from the sources with ``ast``."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prunegraph"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "types": {"errors"},
    "files": {"errors"},
    "reading": {"errors"},
    "users_code": {"errors"},
    "channel_gather": set(),
    "slim_attention": set(),
    "seeding": set(),
    "models": {"errors", "types", "files", "reading", "channel_gather", "users_code"},
    "data": {"errors", "types", "files", "seeding"},
    "graph": {"errors", "types", "files", "channel_gather", "slim_attention", "seeding"},
    "rewards": {"errors", "types"},
    "pruning": {"errors", "types", "files", "reading", "channel_gather", "graph", "seeding"},
    "env": {"errors", "types", "graph", "pruning", "rewards"},
    "agent": {"errors", "types", "files", "reading", "graph", "rewards", "seeding"},
    "pruners": {"errors", "types", "graph", "pruning"},
    "testing": {"errors", "types", "graph", "pruning"},
}
ALLOWED["experiment"] = set(ALLOWED)
ALLOWED["__main__"] = {"experiment"}
OPTIONAL = {"onnx", "onnxruntime", "onnxscript", "ray"}
PARSED = {path: ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
TESTS = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "tests").rglob("test_*.py"))}


def imported(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", PARSED, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = package_of(path)
    for module, node in imported(PARSED[path]):
        parts = module.split(".")
        if own != "__init__" and parts[0] == "prunegraph" and len(parts) > 1:
            assert parts[1] in ALLOWED[own] | {own}, f"{path}:{node.lineno} imports {module}"
        if parts[0] == "stable_baselines3":
            assert own in {"agent", "experiment"}, f"{path}:{node.lineno} imports {module}"


@pytest.mark.parametrize("path", PARSED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_hides_in_a_function(path: Path) -> None:
    for function in ast.walk(PARSED[path]):
        if isinstance(function, ast.FunctionDef):
            hidden = {module.split(".")[0] for module, _ in imported(function)}
            assert hidden <= OPTIONAL, f"{path}:{function.lineno} {function.name}"


@pytest.mark.parametrize("path", PARSED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450


def asserts(function: ast.AST) -> bool:
    """Tell if a test can fail on its own: an assert, or a helper that asserts or expects."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name.startswith(("assert_", "check_", "raises", "expect")):
                return True
    return False


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_can_fail(path: Path) -> None:
    toothless = [
        node.name
        for node in ast.walk(TESTS[path])
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and not asserts(node)
    ]
    assert toothless == []


def test_the_guard_itself_can_fail() -> None:
    assert not asserts(ast.parse("def test_nothing():\n    print(1)"))
