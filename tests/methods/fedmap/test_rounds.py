"""Server, clients and the wire between them: pure, exact, counted as sent."""

import copy
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import nn

from prunegraph.core.errors import ArtefactError, ConfigError, PruneGraphError
from prunegraph.core.precision import as_elsewhere
from prunegraph.core.splits import Dataset, ImageSource
from prunegraph.core.weight_mask import WeightMask
from prunegraph.methods.fedmap.clients import client_data
from prunegraph.methods.fedmap.rounds import (
    Client,
    LocalTraining,
    Server,
    average,
    first_server,
    load_tensors,
    prune,
    send,
    train_client,
    travelling,
)
from prunegraph.methods.fedmap.wire import open_message, pack, weights_of
from prunegraph.models import build_model
from prunegraph.tasks.image_classification import ImageClassification, training_task

TRAINING = LocalTraining(epochs=1, batch_size=16, lr=0.1, seed=3)


@pytest.fixture
def task(digits: Dataset) -> ImageClassification:
    torch.manual_seed(0)
    model = build_model("digits_resnet8_w4", num_classes=10, image_shape=(1, 8, 8))
    return training_task(model, digits.train.take(torch.arange(160)))


def state(server: Server) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in server.tensors.items()}


def test_a_message_holds_what_stays_and_little_else(task: ImageClassification) -> None:
    server = prune(first_server(task.model), 0.9)
    message = send(server, known=0)
    header, content = open_message(message)
    found = weights_of(content, server.tensors, server.mask)
    assert all(torch.equal(found[name], value) for name, value in server.tensors.items())
    masked = {*server.mask.keep}
    others = sum(t.numel() for name, t in server.tensors.items() if name not in masked)
    exact = 4 * (server.mask.num_kept + others) + -(-server.mask.size // 8)
    assert exact < len(message) < exact + 600
    assert header.digest == server.mask.digest()
    assert not any("num_batches" in name for name in server.tensors)


def test_new_bits_are_among_the_weights_before_and_full_for_who_missed_a_change(
    task: ImageClassification,
) -> None:
    first = first_server(task.model)
    second = prune(first, 0.5)
    third = prune(second, 0.9)
    assert third.mask.nested(second.mask)
    assert (third.version, third.mask.sparsity) == (2, pytest.approx(0.9, abs=1e-3))
    assert prune(third, 0.8) is third
    sizes = {known: len(send(third, known)) for known in (0, 1, 2)}
    assert sizes[0] - sizes[1] == pytest.approx(third.mask.size / 16, abs=8)
    assert sizes[1] - sizes[2] == pytest.approx(third.mask.size / 16, abs=100)
    dense = Client(mask=first.mask)
    for client in (
        dense,
        Client(mask=second.mask, version=1),
        Client(mask=third.mask, version=2),
        Client(mask=dense.mask, version=0),
    ):
        message = send(third, client.version)
        new, reply = train_client(task, task.model, client, task.train, message, TRAINING)
        assert new.version == 2
        assert new.mask.digest() == third.mask.digest() == open_message(reply)[0].digest
    server, _ = average(third, [reply])
    model = copy.deepcopy(task.model)
    load_tensors(model, server.tensors)
    third.mask.check_zeros(model)


def test_rounds_are_pure_and_fixed_by_the_seed(task: ImageClassification) -> None:
    server = first_server(task.model)
    before, network = state(server), copy.deepcopy(task.model.state_dict())
    message = send(server, 0)
    client = Client(mask=server.mask)
    replies = [
        train_client(task, task.model, client, task.train, message, training)[1]
        for training in (TRAINING, TRAINING, replace(TRAINING, seed=4))
    ]
    assert replies[0] == replies[1] != replies[2]
    average(server, replies)
    prune(server, 0.5)
    assert all(torch.equal(value, before[name]) for name, value in server.tensors.items())
    after = task.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in network.items())


def test_weights_and_buffers_are_averaged_by_samples(task: ImageClassification) -> None:
    server = first_server(task.model)
    header, _ = open_message(send(server, 0))
    replies = []
    for samples, value in ((30, 1.0), (10, 5.0)):
        tensors = {name: torch.full_like(t, value) for name, t in server.tensors.items()}
        own = replace(header, samples=samples, loss=value)
        replies.append(pack(own, tensors, server.mask))
    averaged, loss = average(server, replies)
    assert loss == 2.0
    assert averaged.round == 1
    assert any("running_var" in name for name in averaged.tensors)
    assert all(bool((value == 2.0).all()) for value in averaged.tensors.values())


def test_batch_norm_is_measured_anew_after_a_new_mask(task: ImageClassification) -> None:
    server = prune(first_server(task.model), 0.5)
    message = send(server, 0)
    knows = Client(mask=server.mask, version=1)

    def variances(client: Client, training: LocalTraining = TRAINING) -> torch.Tensor:
        told = message if client.version == 0 else send(server, 1)
        _, reply = train_client(task, task.model, client, task.train, told, training)
        _, content = open_message(reply)
        found = weights_of(content, server.tensors, server.mask)
        return torch.cat([v for n, v in found.items() if "running_var" in n])

    fresh = variances(Client(mask=first_server(task.model).mask))
    assert not torch.equal(fresh, variances(knows))
    assert torch.equal(fresh, variances(knows, replace(TRAINING, recalibrate=True)))


def test_samples_in_the_order_of_classes_do_not_mislead_batch_norm(digits: Dataset) -> None:
    labels = cast(ImageSource, digits.train.source).labels[digits.train.index]
    train = digits.train.take(labels.argsort(stable=True)[:600])
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    task, server = training_task(model, train), first_server(model)
    training = replace(TRAINING, recalibrate=True, batch_size=50)
    _, reply = train_client(task, model, Client(mask=server.mask), train, send(server, 0), training)
    found = weights_of(open_message(reply)[1], server.tensors, server.mask)
    whole = train.source.load(train.index)[0].flatten(1).var(0)
    varies = whole > 0.01
    assert float((found["1.running_var"] / whole)[varies].mean()) > 0.95  # by class it is 0.6


def test_damaged_messages_are_refused(task: ImageClassification) -> None:
    first = first_server(task.model)
    server = prune(prune(first, 0.5), 0.9)
    stale = Client(mask=prune(first, 0.6).mask, version=1)  # another mask than the server thinks
    dense = Client(mask=first.mask)
    moved = {name: keep.flip(0) for name, keep in server.mask.keep.items()}
    other = Client(mask=WeightMask(moved), version=2)  # as many weights, at other places
    for client, message in (
        (stale, send(server, 1)),
        (dense, b"x"),
        (dense, send(server, 2)),
        (other, send(server, 2)),
    ):
        with pytest.raises(ArtefactError) as refused:
            train_client(task, task.model, client, task.train, message, TRAINING)
        assert "\n" not in str(refused.value)


def test_a_loss_that_is_no_number_ends_the_round(task: ImageClassification) -> None:
    server = first_server(task.model)
    with pytest.raises(PruneGraphError, match=r"loss is (nan|inf) in round 1: lower lr"):
        train_client(
            task,
            task.model,
            Client(mask=server.mask),
            task.train,
            send(server, 0),
            replace(TRAINING, lr=1e30),
        )


def test_a_client_without_samples_is_refused(task: ImageClassification) -> None:
    server = first_server(task.model)
    client, nothing = Client(mask=server.mask), task.train.take(torch.arange(0))
    with pytest.raises(ConfigError, match="a client has no samples: give it some") as refused:
        train_client(task, task.model, client, nothing, send(server, 0), TRAINING)
    assert "\n" not in str(refused.value)


def test_clients_with_a_single_sample_over_train_batch_norm(digits: Dataset) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 10))
    task = training_task(model, digits.train.take(torch.arange(17)))
    data = client_data(task, 1, None, seed=0)
    server = first_server(model)
    client = Client(mask=server.mask)
    _, reply = train_client(task, model, client, data[0].train, send(server, 0), TRAINING)
    assert open_message(reply)[0].samples == 17
    assert set(travelling(model)) == set(server.tensors)


def test_clients_train_in_bfloat16_if_asked_to(task: ImageClassification) -> None:
    message = send(first_server(task.model), known=0)
    client, split = Client(mask=first_server(task.model).mask), task.train
    losses = {}
    with as_elsewhere(bfloat16=True):
        for autocast in (False, True):
            training = replace(TRAINING, autocast=autocast)
            _, reply = train_client(task, task.model, client, split, message, training)
            losses[autocast] = open_message(reply)[0].loss
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.05)
