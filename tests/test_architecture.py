"""The structure that docs/design.md promises, read from the sources with ``ast``."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prunegraph"

ORDER = (
    *("core", "policies", "rewards", "data", "graph", "models", "tasks", "artefacts"),
    *("layerwise", "training", "evaluation", "env", "methods", "agent", "runs", "cli", "testing"),
)
"""The packages; each may import those before it. The tests of users see no runs and no agent."""
MAX_LINES = 700
MAX_FILES = 25
OPTIONAL = {"onnx", "onnxruntime", "onnxscript", "ray"}
OPTIONAL |= {"datasets", "tokenizers", "transformers", "soundfile", "jiwer", "peft"}
OPTIONAL |= {"timm", "huggingface_hub", "pytorch_lightning"}
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


def allowed(own: str) -> set[str]:
    before = {*ORDER[: ORDER.index(own) + 1]}
    return before - {"agent", "runs", "cli"} if own == "testing" else before


@pytest.mark.parametrize("path", PARSED, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = package_of(path)
    if own not in ORDER:  # the package itself and its entry
        assert path.parent == PACKAGE
        return
    for module, node in imported(PARSED[path]):
        parts = module.split(".")
        if parts[0] == "prunegraph" and len(parts) > 1:
            assert parts[1] in allowed(own), f"{path}:{node.lineno} imports {module}"
        if parts[0] == "stable_baselines3":
            assert own in {"agent", "methods"}, f"{path}:{node.lineno} imports {module}"
        if parts[0] == "flwr":
            assert path.name == "flower.py", f"{path}:{node.lineno} imports {module}"


def modules() -> dict[str, set[str]]:
    """Return what each module of the package imports of it, the names of its files."""
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PARSED
    }
    graph = {}
    for name, path in names.items():
        found = set()
        for node in PARSED[path].body:  # not those for the type checker alone
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found.add(whole if whole in names else node.module)
        graph[name] = found & names.keys()
    return graph


def test_no_module_imports_itself_round_a_circle() -> None:
    circles = list(networkx.simple_cycles(networkx.DiGraph(modules())))
    assert [sorted(circle) for circle in circles if "prunegraph" not in circle] == []


def test_rules_of_one_kind_need_no_rules_of_another() -> None:
    rules = {name: found for name, found in modules().items() if ".graph.rules." in name}
    kinds = {name for name in rules if ".shared" not in name and not name.endswith(".table")}
    crossing = {name: found & kinds for name, found in rules.items() if name in kinds}
    assert {name: found for name, found in crossing.items() if found} == {}


def test_folders_stay_small() -> None:
    counts = Counter(path.parent for path in PARSED)
    assert {str(folder): count for folder, count in counts.items() if count > MAX_FILES} == {}


@pytest.mark.parametrize("path", PARSED, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_hides_in_a_function(path: Path) -> None:
    for function in ast.walk(PARSED[path]):
        if isinstance(function, ast.FunctionDef):
            hidden = {module.split(".")[0] for module, _ in imported(function)}
            assert hidden <= OPTIONAL, f"{path}:{function.lineno} {function.name}"


@pytest.mark.parametrize("path", PARSED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


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


@pytest.mark.parametrize("seconds", [300, pytest.param(3600, marks=pytest.mark.slow)])
def test_a_test_that_hangs_fails_by_name(request: pytest.FixtureRequest, seconds: int) -> None:
    own = request.node.get_closest_marker("timeout")
    assert float(own.args[0] if own else request.config.getini("timeout")) == seconds
