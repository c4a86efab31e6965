"""Updates: per-bit clipping, shared advantages, reproducible noise."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.distribution import MaskedBernoulli
from prunegraph.agent.ppo import (
    ChannelPPO,
    equal_share,
    standardise,
    summary,
    update_seed,
)
from prunegraph.agent.train import AgentConfig, build_model, make_vec_env
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from support.toy_env import toy_graphs

GRAPHS = toy_graphs()

MakeModel = Callable[..., ChannelPPO]


@pytest.fixture
def make_model(
    toy_config: Callable[..., AgentConfig], toy_factories: Callable[..., list]
) -> MakeModel:
    def make(workers: int = 4, episodes: int = 16, **options: object) -> ChannelPPO:
        config = toy_config(episodes_per_update=episodes, **options)
        factories = toy_factories(workers, block=episodes, repeat=4)
        return build_model(make_vec_env(factories), GRAPHS, config)

    return make


def parameters(model: ChannelPPO) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()


def decision(logits: torch.Tensor, mask: torch.Tensor) -> MaskedBernoulli:
    return MaskedBernoulli(logits, mask)


def test_the_loss_of_hand_computed_bits(make_model: MakeModel) -> None:
    model = make_model()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    log_ratio = torch.tensor([[1.5, 1.1, 9.0], [0.5, 9.0, 9.0]]).log() * mask
    advantages = torch.tensor([1.0, -1.0])
    logits = torch.zeros(2, 3)
    loss, logs = model._loss(decision(logits, mask), log_ratio, advantages)
    # episode 1: (min(1.5, 1.2) + 1.1) / 2; episode 2, advantage -1: min(-0.5, -0.8)
    assert loss.item() == pytest.approx(-((1.2 + 1.1) / 2 - 0.8) / 2)
    assert logs["clip_fraction"] == pytest.approx((0.5 + 1.0) / 2)
    assert logs["entropy_per_bit"] == pytest.approx(np.log(2))


def test_a_bit_that_was_unlikely_pushes_no_further_than_its_bound(make_model: MakeModel) -> None:
    model = make_model()
    mask = torch.ones(1, 3, dtype=torch.bool)
    log_ratio = torch.tensor([[0.0, 2.0, 500.0]], requires_grad=True)
    loss, logs = model._loss(decision(torch.zeros(1, 3), mask), log_ratio, torch.tensor([-1.0]))
    loss.backward()
    assert log_ratio.grad is not None
    assert log_ratio.grad.tolist()[0] == pytest.approx([1 / 3, np.exp(2.0) / 3, 0.0])
    assert all(np.isfinite(value) for value in logs.values())


def test_advantages_are_centred_in_their_cell_and_scaled_together() -> None:
    advantages = torch.tensor([1.0, 3.0, 10.0, 14.0, 7.0])
    pairs = torch.tensor([0, 0, 1, 1, 2])
    result = standardise(advantages, pairs)
    centred = torch.tensor([-1.0, 1.0, -2.0, 2.0, 0.0])  # one alone compares with nothing
    torch.testing.assert_close(result, centred / centred.std(correction=0))


def test_equal_rewards_move_nothing_but_rounding(make_model: MakeModel) -> None:
    assert standardise(torch.ones(4), torch.zeros(4)).abs().max() == 0.0
    rounded = torch.tensor([0.8137, 0.81370005, 0.8136999, 0.8137])  # as float32 leaves them
    assert standardise(rounded, torch.zeros(4)).abs().max() == 0.0


def test_equal_share() -> None:
    assert equal_share(torch.tensor([[1, 0], [1, 0], [0, 0], [1, 0]])) == pytest.approx(2 / 3)
    assert equal_share(torch.ones(5, 2)) == 1.0
    assert equal_share(torch.eye(5)) == 0.0


def test_summary_of_records() -> None:
    rows = [{"accuracy": 0.5, "repaired": 0.0}, {"accuracy": 0.7, "repaired": 0.1}]
    expected = {"accuracy": 0.6, "repaired": 0.05, "best_accuracy": 0.7}
    assert summary(rows) == pytest.approx(expected)
    assert summary([]) == {}


def test_an_update_changes_the_policy_and_logs(make_model: MakeModel) -> None:
    model = make_model()
    before = parameters(model)
    model.learn(16)
    assert not torch.equal(parameters(model), before)
    (record,) = model.history
    assert record["update"] == 1
    assert record["networks"] == 16
    assert record["approx_kl"] > 0.0
    assert record["equal_actions"] == 0.0
    assert 0.0 < record["distance_to_uniform"] < 1.0
    assert 0.0 < record["repaired"] < 0.5
    assert record["accuracy"] == pytest.approx(0.5, abs=0.15)
    assert model.logger.name_to_value["train/approx_kl"] == record["approx_kl"]


def test_learning_rate_zero_only_samples(make_model: MakeModel) -> None:
    model = make_model(ppo=PPOConfig(learning_rate=0.0))
    before = parameters(model)
    model.learn(32)
    assert torch.equal(parameters(model), before)
    assert model.history[0]["accuracy"] != model.history[1]["accuracy"]


def test_the_number_of_environments_changes_nothing(make_model: MakeModel) -> None:
    histories = []
    for workers in (1, 2, 8):
        model = make_model(workers)
        model.learn(48)
        histories.append(model.history)
    for other in histories[1:]:
        for one, two in zip(histories[0], other, strict=True):
            assert one.keys() == two.keys()
            for name, value in one.items():
                if name != "greedy_masks":
                    assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_seeds_fix_the_run(make_model: MakeModel) -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.rand(3)  # the global generator must not matter
        model = make_model(seed=seed)
        model.learn(32)
        runs.append(parameters(model))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_greedy_mask_holds_what_the_search_found(make_model: MakeModel) -> None:
    model = make_model()
    model.learn(16)
    row = {name: array[0] for name, array in model._last_obs.items()}
    graph_id, budget = int(row["graph_id"][0]), Budget(keep_macs=0.5)
    graph = model.policy.thresholds[graph_id].graph
    gone = np.flatnonzero(graph.free & ~model.greedy_mask(row, budget))[0]
    with torch.no_grad():
        model.policy.offsets.channels[str(graph_id)][gone] = 100.0
    assert model.greedy_mask(row, budget)[gone]


def test_update_seeds_differ() -> None:
    seeds = {update_seed(seed, update) for seed in range(20) for update in range(20)}
    assert len(seeds) == 400
    assert update_seed(3, 4) == update_seed(3, 4)


def test_networks_are_not_overspent(make_model: MakeModel) -> None:
    model = make_model()
    model.max_networks = 40
    model.learn(10_000)
    assert model.num_networks == 32
    assert [record["networks"] for record in model.history] == [16, 32]
    assert [record["temperature"] for record in model.history] == pytest.approx([1.0, 1.0])


def test_wide_networks_are_drawn_at_a_lower_temperature(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = make_model().policy.initial_temperature
    most = max(graph.num_units for graph in GRAPHS)
    monkeypatch.setattr("prunegraph.agent.ppo.MANY_BITS", most / 4)
    model = make_model()
    assert model.policy.initial_temperature == usual / 2
    model.learn(1)
    assert model.policy.temperature == usual / 2


def test_temperature_is_geometric() -> None:
    config = PPOConfig(temperature_start=0.4, temperature_end=0.1)
    assert [config.temperature(p) for p in (-1.0, 0.0, 0.5, 1.0, 2.0)] == pytest.approx(
        [0.4, 0.4, 0.2, 0.1, 0.1]
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature_end": 0.0}, "temperatures 0.3 and 0.0"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must lie"),
        ({"surrogate_rate": float("nan")}, "surrogate_rate=nan"),
        ({"surrogate_steps": -3}, "surrogate_steps=-3"),
        ({"group_noise_end": 0.0}, "group_noise_end=0 cannot be reached"),
    ],
)
def test_bad_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PPOConfig(**options)


@pytest.mark.parametrize("workers", [1, 8])
def test_every_second_mask_is_planned_and_learned_from(make_model: MakeModel, workers: int) -> None:
    model = make_model(workers, ppo=PPOConfig(surrogate_steps=2, swaps=3))
    seen = []

    def plan(graph_id: int, bits: torch.Tensor, limits: np.ndarray) -> torch.Tensor:
        seen.append((graph_id, bits.clone()))
        return 1.0 - bits

    model.policy.plan = plan
    model.learn(16)
    assert len(seen) == 8
    actions = torch.from_numpy(model.rollout_buffer.actions).reshape(16, -1)
    for (_, bits), action in zip(seen, actions[1::2], strict=True):
        assert torch.equal(action[: len(bits)].float(), 1.0 - bits)


def test_plans_are_made_as_soon_as_something_is_predicted(make_model: MakeModel) -> None:
    model = make_model(1, ppo=PPOConfig(surrogate_steps=2, swaps=3))
    planned = []
    plan = model.policy.plan
    assert plan is not None

    def watched(graph_id: int, bits: torch.Tensor, limits: np.ndarray) -> torch.Tensor:
        planned.append(bool((plan(graph_id, bits, limits) != bits).any()))
        return bits

    model.policy.plan = watched
    model.learn(32)
    assert not any(planned[:8])
    assert any(planned[8:])


def test_nothing_is_planned_where_nothing_is_predicted(make_model: MakeModel) -> None:
    assert make_model(1, ppo=PPOConfig(swaps=3)).policy.plan is None
    assert make_model(1, ppo=PPOConfig(surrogate_steps=2)).policy.plan is None


def test_a_channel_steps_by_the_episodes_that_decide_on_it(make_model: MakeModel) -> None:
    model = make_model(1)
    offsets, size = model.policy.offsets, model.policy.thresholds[0].num_channels
    free = torch.from_numpy(model.policy.thresholds[0].graph.free)
    mask = torch.zeros(4, size, dtype=torch.bool)
    mask[:2] = free
    mask[2:, torch.nonzero(free)[0]] = True  # other steps decide on another channel
    logits = (offsets(0) / model.policy.temperature).expand(4, size)
    found = decision(logits, mask)
    bits, advantages = torch.ones(4, size), torch.tensor([1.0, 2.0, 4.0, 5.0])
    log_prob = found.log_prob_bits(bits)
    weights = advantages[:, None] / found.num_free()[:, None] / 4
    (-(weights * log_prob).sum()).backward()
    model._move_offsets(torch.zeros(4, dtype=torch.long), found, 0.01, 0.0)
    moved = offsets.channels["0"].detach()[free]
    assert moved[1:].tolist() == pytest.approx([0.01 * 0.5 * 1.5] * (int(free.sum()) - 1))
