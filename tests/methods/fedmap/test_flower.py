"""A federation on Flower: in one process as the own loop, to the bit; by ``flwr run`` too."""

import contextlib
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import prunegraph as pg
from prunegraph.core.errors import ConfigError, PruneGraphError
from prunegraph.core.splits import Dataset
from prunegraph.core.task import Task
from prunegraph.methods.fedmap.clients import client_data
from prunegraph.methods.fedmap.method import FedAvg, Federation, FedMap
from prunegraph.methods.method import Problem, Result
from prunegraph.models import build_model
from support.federation import SMALL, make_task, pose

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
pytest.importorskip("flwr", reason="needs pip install 'prunegraph[flower]'")

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from prunegraph.methods.fedmap.flower import OnFlower, client_reply


class OneProcess(Grid):
    """Calls a client app for each message, as a simulation does; counts what it would send."""

    def __init__(self, app: ClientApp, clients: int) -> None:
        self.app, self.sent, self.failed, self.seen = app, 0, 0, []
        self.contexts = {  # nodes are listed in another order than clients are numbered
            node: Context(1, node, {"partition-id": node - 1}, RecordDict(), {})
            for node in range(clients, 0, -1)
        }
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 99, 1

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        del timeout
        answers = [self.answer(message) for message in messages]
        return answers[::-1]  # in no order

    def answer(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        self.seen.append(node - 1)
        try:
            reply = self.app(message, self.contexts[node])
        except Exception as error:
            self.failed += 1
            return Message(Error(code=0, reason=f"{error}"), reply_to=message)
        for each in (message, reply):
            self.sent += sum(len(o.deflate()) for o in get_all_nested_objects(each).values())
        return reply

    run = set_run = create_message = push_messages = pull_messages = None


def app_of(task: Task, method: Federation, seed: int = 0) -> ClientApp:
    data, app = client_data(task, method.clients, method.dirichlet, seed), ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        return client_reply(message, context, task=task, split=data[number].train, number=number)

    return app


def on_flower(method: Federation, problem: Problem) -> tuple[Result, OneProcess]:
    grid = OneProcess(app_of(problem.task, method, problem.seed), method.clients)
    return OnFlower(method, grid).prune(problem), grid


def assert_equal(one: Result, other: Result) -> None:
    assert one.mask == other.mask
    assert one.model is not None
    assert other.model is not None
    weights: Mapping[str, Tensor] = other.model.state_dict()
    assert all(torch.equal(value, weights[n]) for n, value in one.model.state_dict().items())
    for name in ("bytes_up", "bytes_down", "losses"):
        assert one.details[name] == other.details[name]


@pytest.mark.parametrize(
    "method",
    [
        FedMap(**SMALL, every=1, dirichlet=0.5),
        FedMap(**{**SMALL, "rounds": 6}, every=1, participants=2),
        FedAvg(**SMALL, dirichlet=0.5),
    ],
    ids=["fedmap", "some", "fedavg"],
)
def test_flower_and_the_own_loop_agree_to_the_bit(digits: Dataset, method: Federation) -> None:
    found, grid = on_flower(method, pose(digits, seed=3))
    assert_equal(found, method.prune(pose(digits, seed=3)))
    assert len(grid.seen) == method.rounds * (method.participants or method.clients)
    if method.participants:
        assert grid.seen[:2] != grid.seen[2:4]


def test_counted_bytes_are_what_flower_serialises_within_3_percent(digits: Dataset) -> None:
    model = build_model("digits_resnet8_w8_gn", num_classes=10, image_shape=(1, 8, 8))
    task = replace(make_task(digits), model=model.eval())
    method = FedMap(**{**SMALL, "rounds": 2}, every=1, until=1.0)
    found, grid = on_flower(method, pose(digits, task=task, budget=pg.Budget(sparsity=0.9)))
    counted = found.details["bytes_up"] + found.details["bytes_down"]
    assert counted == pytest.approx(grid.sent, rel=0.03)
    assert counted < grid.sent


def test_a_server_that_is_stopped_goes_on_with_nodes_that_know_no_mask(
    digits: Dataset, tmp_path: Path
) -> None:
    method = FedMap(**SMALL, every=1)
    whole = method.prune(pose(digits))

    def stop(done: int, _: str) -> None:
        if done == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on_flower(method, pose(digits, folder=tmp_path, progress=stop))
    found, grid = on_flower(method, pose(digits, folder=tmp_path))
    assert len(grid.seen) == 2 * 4
    sent = found.details["bytes_down"] - whole.details["bytes_down"]
    assert 0 < sent < 4 * whole.mask.size / 8  # full bits in place of those among what was left
    assert_equal(replace(found, details=whole.details), whole)


def test_a_client_that_has_lost_its_state_is_left_out_once(digits: Dataset) -> None:
    method = FedMap(**{**SMALL, "rounds": 5}, every=1, until=0.3)
    task = make_task(digits)
    grid = OneProcess(app_of(task, method), method.clients)
    kept: list[int] = []

    def lose(done: int, _: str) -> None:
        kept.append(sum("fedmap" in context.state for context in grid.contexts.values()))
        if done == 60:
            grid.contexts[2].state = RecordDict()

    found = OnFlower(method, grid).prune(pose(digits, progress=lose))
    assert kept == [4, 4, 4, 3, 4]
    assert found.model is not None
    found.mask.check_zeros(found.model)  # type: ignore[union-attr]


def test_a_client_whose_reply_is_late_comes_back_with_the_mask_of_all(digits: Dataset) -> None:
    class Late(OneProcess):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            answers = list(super().send_and_receive(messages))
            return answers[1:] if len(self.seen) == 3 * 4 else answers  # in the third round

    method, problem = FedMap(**{**SMALL, "rounds": 6}, every=1), pose(digits)
    grid = Late(app_of(problem.task, method), method.clients)
    found = OnFlower(method, grid).prune(problem)
    known = [context.state["fedmap"] for context in grid.contexts.values()]
    assert {state["digest"] for state in known} == {found.mask.digest()}
    assert len(grid.seen) == 6 * 4
    assert grid.failed == 0


def test_what_fails_on_every_client_ends_the_federation_in_one_line(digits: Dataset) -> None:
    problem = pose(digits)
    with pytest.raises(PruneGraphError, match=r"round 1: no client has trained: .*lower lr") as no:
        on_flower(FedMap(**{**SMALL, "lr": 1e30}), problem)
    assert "\n" not in str(no.value)

    class Silent(OneProcess):
        def send_and_receive(
            self, messages: Iterable[Message], *, timeout: float | None = None
        ) -> Iterable[Message]:
            return [*messages][:0]

    method = FedMap(**SMALL)
    grid = Silent(app_of(problem.task, method), method.clients)
    with pytest.raises(PruneGraphError, match="none has answered in time"):
        OnFlower(method, grid, timeout=0.1).prune(problem)


def test_too_few_nodes_are_waited_for_and_then_named(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunegraph.methods.fedmap.flower.WAIT", 0.3)
    method = FedMap(**SMALL)
    grid = OneProcess(app_of(make_task(digits), method), 2)
    with pytest.raises(ConfigError, match=r"2 nodes are there after 0\.3 s.*num-supernodes=4"):
        OnFlower(method, grid).prune(pose(digits))
    assert grid.seen == []


def test_prune_takes_it_as_any_method(digits: Dataset) -> None:
    method, task = FedMap(**SMALL, every=1), make_task(digits)
    grid = OneProcess(app_of(task, method), method.clients)
    result = pg.prune(task, OnFlower(method, grid), pg.Budget(sparsity=0.8))
    own = pg.prune(task, method, pg.Budget(sparsity=0.8))
    assert result.report["method"] == "fedmap"
    assert result.mask == own.mask
    assert result.report["pruned"] == own.report["pruned"]


PAGE = Path(__file__).resolve().parents[3] / "docs" / "masked-training.md"
FILE = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.M | re.S)


def started_with(home: str) -> list[int]:
    """Return the processes, by id, whose environment names a folder of Flower's."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended
            if f"FLWR_HOME={home}".encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def flower_environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Return the variables of a server at work; all that it started is stopped by process id."""
    pytest.importorskip("ray", reason="needs pip install 'prunegraph[flower]'")
    home, http, control = str(tmp_path / "flower"), free_port(), free_port()
    root = Path(pg.__file__).resolve().parents[1]
    environment = {
        **os.environ,
        "FLWR_HOME": home,
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": http,
        "FLWR_LOCAL_CONTROL_API_PORT": control,
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }
    words = ["flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess"]
    words += ["--host", "127.0.0.1", "--port", http]  # flwr run waits 15 s for one of its own
    words += ["--control-api-address", f"127.0.0.1:{control}"]
    server = subprocess.Popen(words, env=environment, cwd=tmp_path)
    end = time.monotonic() + 180
    while not is_open(http) and time.monotonic() < end:
        assert server.poll() is None
        time.sleep(0.5)
    yield environment
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        for pid in started_with(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, wanted)
        end = time.monotonic() + 30
        while started_with(home) and time.monotonic() < end:
            time.sleep(0.2)
    server.wait(30)
    assert started_with(home) == []


def is_open(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(port))) == 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="stops processes by /proc")
def test_flwr_run_with_ten_supernodes_ends_as_the_own_loop(
    tmp_path: Path, flower_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, code in FILE.findall(PAGE.read_text(encoding="utf-8")):
        (tmp_path / name).write_text(code, encoding="utf-8")
    out = tmp_path / "pruned"
    words = ["flwr", "run", ".", "--stream", "--federation-config", "num-supernodes=10"]
    words += ["--run-config", f'rounds=3 out="{out}"']
    ran = subprocess.run(
        words, cwd=tmp_path, env=flower_environment, capture_output=True, text=True, timeout=900
    )
    assert (out / "mask.json").is_file(), (ran.stdout + ran.stderr)[-3000:]
    monkeypatch.chdir(tmp_path)
    app: dict[str, Any] = runpy.run_path("app.py")
    method = FedMap(clients=10, dirichlet=0.3, rounds=3)
    own = pg.prune(app["make_task"](), method, pg.Budget(sparsity=0.9), seed=0)
    found = load_file(out / "pruned.safetensors")
    assert own.report["bytes_up"] > 0
    for name, value in own.model.state_dict().items():
        assert (found[name] - value).abs().max() <= 1e-3, name
    assert pg.WeightMask.load(out / "mask.safetensors") == own.mask
