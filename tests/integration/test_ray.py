"""A search on a Ray cluster that the test starts: a head that computes nothing, two nodes."""

import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from prunegraph.agent import search
from prunegraph.cli.main import main
from prunegraph.core.errors import ConfigError
from prunegraph.evaluation.evaluator import Evaluator
from prunegraph.runs import ray_pool

ROOT = Path(__file__).resolve().parents[2]

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray, an optional dependency, is absent"
)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a cluster; ``cluster.workers`` are its two nodes of one CPU."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the nodes' processes
    small = {"object_store_memory": 100 << 20}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small}
    )
    cluster.workers = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    yield cluster
    cluster.shutdown()


@pytest.fixture
def after_update(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Return a way to have something done after an update of the search."""

    def arrange(update: int, action: Callable[[], None]) -> None:
        show = search._show

        def show_and_act(*arguments: Any) -> None:
            record: Mapping[str, Any] = arguments[-1]
            show(*arguments)
            if record["update"] == update:
                action()

        monkeypatch.setattr(search, "_show", show_and_act)

    return arrange


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ray's own
def test_a_node_dies_and_the_result_is_that_of_one_worker(
    cluster: Any,
    after_update: Callable[[int, Callable[[], None]], None],
    one_worker: Path,
    one_worker_words: list[str],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
) -> None:
    died = []

    def kill() -> None:
        cluster.remove_node(cluster.workers[0], allow_graceful=False)
        died.append(True)

    after_update(3, kill)
    path = tmp_path / "run"
    assert main([*one_worker_words, "--ray", cluster.address, "--out", str(path)]) == 0
    assert died
    assert_same_run(one_worker, path)


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_without_a_node_a_search_ends_in_one_line_and_goes_on_elsewhere(
    cluster: Any,
    after_update: Callable[[int, Callable[[], None]], None],
    one_worker: Path,
    one_worker_words: list[str],
    assert_same_run: Callable[[Path, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def kill_all() -> None:
        for node in cluster.workers:
            cluster.remove_node(node, allow_graceful=False)

    after_update(3, kill_all)
    monkeypatch.setattr(ray_pool, "POLL", 0.5)
    monkeypatch.setattr(ray_pool, "PATIENCE", 1.0)
    words = [*one_worker_words, "--out", str(tmp_path / "run")]
    assert main([*words, "--ray", cluster.address]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("prunegraph: no node of the Ray cluster is left")
    assert errors.count("\n") == 1
    monkeypatch.undo()
    assert main(words) == 0
    assert_same_run(one_worker, tmp_path / "run")


@needs_ray
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_address_without_a_cluster_is_told_in_one_line(
    quick_words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*quick_words, "--ray", "127.0.0.1:1", "--out", str(tmp_path / "run")]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("prunegraph: no Ray cluster at '127.0.0.1:1'")
    assert errors.count("\n") == 1


def test_a_gpu_that_ray_does_not_hand_out_is_told_before_the_search() -> None:
    evaluator = cast("Evaluator", SimpleNamespace(device=torch.device("cuda:1")))
    with pytest.raises(ConfigError, match=r"--device cuda in place of cuda:1"):
        ray_pool.RayPool("auto", [evaluator])


def test_a_missing_ray_is_told_with_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="--ray needs ray: pip install ray"):
        ray_pool.load_ray()
    for command in ("train", "compare"):  # before the dense network is trained
        assert main([command, "--ray", "auto", "--out", str(tmp_path / "run")]) == 2
        assert "--ray needs ray" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
