"""A federation whose messages Flower carries: the client and server functions of the own loop.

A client app answers with ``client_reply``; a server app gives ``OnFlower`` to ``prunegraph.prune``.
Needs ``pip install 'prunegraph[flower]'``. Payloads are the bytes of the own loop, in one array.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch

from prunegraph.core.errors import ConfigError, PruneGraphError
from prunegraph.core.splits import TrainSplit
from prunegraph.core.task import Task
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network, unwrap
from prunegraph.methods.fedmap.conductor import Conductor
from prunegraph.methods.fedmap.method import Federation
from prunegraph.methods.fedmap.rounds import Client, LocalTraining, train_client
from prunegraph.methods.fedmap.wire import mask_bits, open_message, with_bits
from prunegraph.methods.method import Kind, Problem, Result, Role
from prunegraph.training.masked import dense_mask

try:
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
    )
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
except ImportError as error:
    msg = "a federation on Flower needs flwr 1.42 or newer: pip install 'prunegraph[flower]'"
    raise ConfigError(msg) from error

MESSAGE, CLIENT, BITS, STATE = "message", "client", "fedmap-mask", "fedmap"
"""Names of what messages and a client's state hold."""

WAIT = 600.0
"""Seconds for which a server waits until its clients are there."""


def client_reply(
    message: Message, context: Context, *, task: Task, split: TrainSplit, number: int
) -> Message:
    """Train on a client's samples, and return what its app answers.

    Args:
        message: of the server.
        context: of the client; its state keeps the mask that the client knows.
        task: gives the network's structure and the loss.
        split: the client's samples.
        number: of the client, from 0; another one for each: fixes its order and augmentation.

    Raises:
        PruneGraphError: there are no samples, the loss becomes NaN, or the message is damaged.
    """
    config = message.content["config"]
    training = LocalTraining(**{item.name: config[item.name] for item in fields(LocalTraining)})
    network = copy_network(unwrap(task.model))
    task.place_model(network, next(network.parameters()).device)
    dense = dense_mask(network)
    client, reply = train_client(
        task,
        network,
        _recall(context, dense),
        split,
        _payload(message),
        training.of_client(number),
    )
    context.state[BITS] = ArrayRecord({"bits": Array(mask_bits(client.mask, dense).numpy())})
    context.state[STATE] = ConfigRecord({"version": client.version, "digest": client.mask.digest()})
    header, _ = open_message(reply)
    metrics = MetricRecord({"num-examples": header.samples, "loss": header.loss, CLIENT: number})
    return Message(RecordDict({"arrays": _record(reply), "metrics": metrics}), reply_to=message)


class FederationStrategy(FedAvg):
    """Flower's FedAvg with masks: sends what stays, averages in float64, prunes by the schedule.

    Replies are averaged in the order of the clients' numbers, so sums are the same to the bit.
    A client that fails, or is late, is left out of the round, and sent the whole mask next time.

    Args:
        conductor: of ``Federation.conductor``.
    """

    def __init__(self, conductor: Conductor) -> None:
        super().__init__(
            min_train_nodes=conductor.participants,
            min_available_nodes=len(conductor.done.versions),
            fraction_evaluate=0.0,
        )
        self.conductor = conductor
        self._nodes: Sequence[int] = ()
        self._asked: frozenset[int] = frozenset()

    def arrays(self) -> ArrayRecord:
        """Return the network's weights and buffers, by their names."""
        found = {}
        for name, value in self.conductor.server.tensors.items():
            value = value.detach().cpu()
            found[name] = value.float() if value.dtype == torch.bfloat16 else value
        return ArrayRecord(found)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages of a round; ``arrays`` is what the conductor holds already."""
        del arrays
        if not self._nodes:
            self._nodes = _wait_for_nodes(grid, self.min_available_nodes)
        config["server-round"] = server_round
        for name, value in asdict(self.conductor.training()).items():
            config[name] = value
        messages: list[Message] = []
        sent = self.conductor.messages()
        self._asked = frozenset(sent)
        for number, payload in sent.items():
            content = RecordDict({"arrays": _record(payload), "config": config})
            messages += self._construct_messages(content, [self._nodes[number]], MessageType.TRAIN)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Average the replies and prune.

        Raises:
            PruneGraphError: no client has trained.
        """
        answers, failed = self._check_and_log_replies(replies, is_train=True)
        answers.sort(key=lambda reply: reply.content["metrics"][CLIENT])
        payloads = {self._nodes.index(r.metadata.src_node_id): _payload(r) for r in answers}
        for number in self._asked - payloads.keys():
            self.conductor.forget(number)
        if not answers:
            reasons = [" ".join(str(failure.error.reason).split()) for failure in failed]
            why = reasons[0] if reasons else "none has answered in time"
            msg = f"round {server_round}: no client has trained: {why}"
            raise PruneGraphError(msg)
        self.conductor.take(payloads)
        done = self.conductor.done
        metrics = {
            "loss": done.losses[-1],
            "sparsity": self.conductor.server.mask.sparsity,
            "bytes-up": done.bytes_up,
            "bytes-down": done.bytes_down,
        }
        return self.arrays(), MetricRecord(metrics)


@dataclass(frozen=True, eq=False)
class OnFlower:
    """A federation, as a method, that trains on the nodes of a Flower grid.

    Attributes:
        method: ``FedMap`` or ``FedAvg``. Its clients are the first nodes of the grid.
        grid: of the server app.
        timeout: seconds for which a round waits for its replies.
    """

    method: Federation
    grid: Grid
    timeout: float = 3600.0

    searches = False
    per_seed = True

    @property
    def name(self) -> str:
        """The federation's."""
        return self.method.name

    @property
    def role(self) -> Role:
        """The federation's."""
        return self.method.role

    @property
    def kind(self) -> Kind:
        """Single weights."""
        return self.method.kind

    def check(self, problem: Problem) -> None:
        """Say before any work what cannot be served; the server need not have the samples."""
        self.method.check_network(problem)

    def prune(self, problem: Problem) -> Result:
        """Train for all rounds; a server that was stopped goes on after its last round."""
        self.check(problem)
        network = self.method.network(problem)
        conductor = self.method.conductor(problem, network)
        for number in range(self.method.clients):
            conductor.forget(number)  # the nodes of another run know no mask
        if not conductor.finished:
            strategy = FederationStrategy(conductor)
            left = conductor.rounds - conductor.server.round
            strategy.start(self.grid, strategy.arrays(), num_rounds=left, timeout=self.timeout)
        return self.method.result(network, conductor)


def _wait_for_nodes(grid: Grid, clients: int) -> Sequence[int]:
    """Return as many nodes as there are clients, sorted."""
    end = time.monotonic() + WAIT
    while len(nodes := sorted(grid.get_node_ids())) < clients:
        if time.monotonic() > end:
            msg = (
                f"clients={clients}, but {len(nodes)} nodes are there after {WAIT:g} s: start as "
                f"many, in a simulation by --federation-config 'num-supernodes={clients}'"
            )
            raise ConfigError(msg)
        time.sleep(0.2)
    return nodes[:clients]


def _recall(context: Context, dense: WeightMask) -> Client:
    """Return what a client knew after its last round."""
    if STATE not in context.state:
        return Client(mask=dense)
    known = context.state[STATE]
    bits = torch.from_numpy(context.state[BITS]["bits"].numpy())
    return Client(mask=with_bits(dense, bits, known["digest"]), version=known["version"])


def _record(payload: bytes) -> ArrayRecord:
    return ArrayRecord({MESSAGE: Array(np.frombuffer(payload, np.uint8))})


def _payload(message: Message) -> bytes:
    found: bytes = message.content["arrays"][MESSAGE].numpy().tobytes()
    return found
