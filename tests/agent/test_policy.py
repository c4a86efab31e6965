"""The seam with stable-baselines3: padding, batches, masks, budgets."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from prunegraph.agent.policy import ChannelPruningPolicy
from prunegraph.agent.threshold import BudgetThreshold, expected_cost_ratio
from prunegraph.core.errors import ConfigError
from prunegraph.graph.costs.memory import MemoryModel, Storage

MakePolicy = Callable[..., ChannelPruningPolicy]
Observe = Callable[..., dict[str, Tensor]]


def expected_ratios(policy: ChannelPruningPolicy, obs: dict[str, Tensor]) -> list[float]:
    """Return the expected cost over the budget of each row."""
    probabilities = policy.decide(obs).probabilities().detach().double().numpy()
    ratios = []
    for row, graph_id in enumerate(obs["graph_id"][:, 0].long().tolist()):
        graph = policy.thresholds[graph_id].graph
        kept = np.where(graph.frozen, 1.0, probabilities[row, : graph.num_units])
        limit = float(obs["context"][row, 0]) * graph.dense_cost.macs
        ratios.append(
            expected_cost_ratio(graph, kept[None], np.array([[limit, np.inf, np.inf, np.inf]]))[0]
        )
    return ratios


def judged(
    policy: ChannelPruningPolicy, obs: dict[str, Tensor], actions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies ``[B]``."""
    distribution = policy.decide(obs)
    return distribution.log_prob(actions), distribution.entropy()


def test_the_expected_cost_meets_the_budget(make_policy: MakePolicy, observe: Observe) -> None:
    obs = observe(6)
    obs["context"][::2, 0] += 0.2
    assert expected_ratios(make_policy(), obs) == pytest.approx([1.0] * 6, rel=1e-5)


def test_no_gradient_leaves_the_budget(make_policy: MakePolicy, observe: Observe) -> None:
    """The threshold follows the scores: whatever they do, the expected cost stays."""
    policy, obs = make_policy(), observe(1)
    graph_id = int(obs["graph_id"][0, 0])
    graph, channels = policy.thresholds[graph_id].graph, policy.offsets.channels[str(graph_id)]
    torch.nn.init.normal_(policy.offsets.groups[str(graph_id)], std=3.0)  # groups of all widths
    probabilities = policy.decide(obs).probabilities()[0, : graph.num_units]
    kept = np.where(graph.frozen, 1.0, probabilities.detach().double().numpy())
    slopes = np.where(graph.free, graph.cost_model.slopes(kept[None])[0, 0], 0.0)
    costs = torch.from_numpy(slopes).float() * probabilities
    (moved,) = torch.autograd.grad(costs.sum(), channels, retain_graph=True)
    (of_half,) = torch.autograd.grad(costs[::2].sum(), channels)
    assert of_half.abs().max() > 0.01 * costs.sum()
    assert moved.abs().max() < 3e-3 * of_half.abs().max()


def test_no_gradient_leaves_a_memory(make_policy: MakePolicy, observe: Observe) -> None:
    policy, obs = make_policy(), observe(1)
    obs["context"][:, 0] = 1.0
    graph_id = int(obs["graph_id"][0, 0])
    graph, channels = policy.thresholds[graph_id].graph, policy.offsets.channels[str(graph_id)]
    storages = [
        Storage(bytes_per_position=4, units=group.units, born=number, died=number + 2)
        for number, group in enumerate(graph.groups)
    ]
    memory = MemoryModel(graph.num_units, storages)
    most = int(0.7 * memory.peak(graph.dense_mask().keep))
    known = dataclasses.replace(graph, memory_model=memory)
    policy.thresholds[graph_id] = BudgetThreshold.of(known, most)
    torch.nn.init.normal_(policy.offsets.groups[str(graph_id)], std=1.0)
    probabilities = policy.decide(obs).probabilities()[0, : graph.num_units]
    kept = np.where(graph.frozen, 1.0, probabilities.detach().double().numpy())
    moments = memory.moments(kept[None])[0]
    assert moments.max() == pytest.approx(most, rel=1e-5)
    slopes = np.where(graph.free, memory.bytes_in(moments[None].argmax(axis=1))[0], 0.0)
    needs = torch.from_numpy(slopes).float() * probabilities
    (moved,) = torch.autograd.grad(needs.sum(), channels, retain_graph=True)
    (of_half,) = torch.autograd.grad(needs[::2].sum(), channels)
    assert of_half.abs().max() > 0.001 * needs.sum()
    assert moved.abs().max() < 3e-3 * of_half.abs().max()


def test_lagrangian_solves_for_the_untrained_policy_only(
    make_policy: MakePolicy, observe: Observe
) -> None:
    obs = observe(4)
    start = make_policy(trained=False, constraint="lagrangian", initial_cost_ratio=1.5)
    assert expected_ratios(start, obs) == pytest.approx([1.5] * 4, rel=1e-5)
    trained = make_policy(constraint="lagrangian")
    assert max(abs(ratio - 1.0) for ratio in expected_ratios(trained, obs)) > 0.02
    with torch.no_grad():
        trained.network.channel_head[-1].bias += 5.0
    assert min(expected_ratios(trained, obs)) > 1.5


def test_padding_changes_nothing(make_policy: MakePolicy, observe: Observe) -> None:
    policy, padded_policy = make_policy(), make_policy(pad_to=50)
    obs, padded = observe(5), observe(5, pad_to=50)
    size = obs["action_mask"].shape[1]
    actions = policy.decide(obs).mode()
    padded_actions = padded_policy.decide(padded).mode()
    assert torch.equal(padded_actions[:, :size], actions)
    log_prob, entropy = judged(policy, obs, 1 - actions)
    padded_log_prob, padded_entropy = judged(padded_policy, padded, 1 - padded_actions)
    torch.testing.assert_close(padded_log_prob, log_prob)
    torch.testing.assert_close(padded_entropy, entropy)
    assert log_prob.shape == entropy.shape == (5,)


def test_a_batch_equals_singles(make_policy: MakePolicy, observe: Observe) -> None:
    policy, obs = make_policy(), observe(6)
    obs = {name: torch.cat([value, value[:2]]) for name, value in obs.items()}  # with repetitions
    obs["context"][7, 0] = 0.6  # the same network under another budget
    actions = policy.decide(obs).mode()
    batch = judged(policy, obs, actions)
    for row in range(8):
        single = {name: value[row : row + 1] for name, value in obs.items()}
        found = judged(policy, single, actions[row : row + 1])
        for one, many in zip(found, batch, strict=True):
            torch.testing.assert_close(one[0], many[row], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(batch[1][7], batch[1][1])


def test_equal_graphs_are_encoded_once(
    make_policy: MakePolicy, observe: Observe, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, obs = make_policy(), observe(1)
    obs = {name: value.expand(16, -1).clone() for name, value in obs.items()}
    obs["context"][8:, 0] = 0.6
    sizes = []
    encode = policy.network.encode
    monkeypatch.setattr(
        policy.network, "encode", lambda data: sizes.append(data.num_channels) or encode(data)
    )
    assert len(policy.decide(obs).logits.unique(dim=0)) == 2
    assert sizes == [policy.thresholds[int(obs["graph_id"][0])].num_channels]


def test_entropy_at_zero_logits_counts_the_free_masks(
    make_policy: MakePolicy, observe: Observe
) -> None:
    policy, obs = make_policy(trained=False, constraint="lagrangian"), observe(3)
    policy.initial_cost_ratio = 1e9  # keeps everything ...
    policy.temperature = 1e9  # ... at a temperature that makes all logits zero
    entropy = policy.decide(obs).entropy()
    free = obs["action_mask"].sum(1)
    torch.testing.assert_close(entropy.exp(), 2.0**free, rtol=1e-5, atol=0.0)
    assert len(free.unique()) > 1


def test_closed_bits_are_kept_and_carry_nothing(make_policy: MakePolicy, observe: Observe) -> None:
    policy, obs = make_policy(), observe(4)
    obs["action_mask"][:, 1:4] = 0.0  # as in an episode of one step a group
    policy.generator = torch.Generator().manual_seed(0)
    actions, _, log_prob = policy(obs)
    closed = obs["action_mask"] == 0
    assert (actions[closed] == 1).all()
    assert (actions[~closed] == 0).any()
    other = torch.where(closed, 1 - actions, actions)
    torch.testing.assert_close(judged(policy, obs, other)[0], log_prob)


def test_predict_is_the_mode(make_policy: MakePolicy, observe: Observe) -> None:
    policy, obs = make_policy(), observe(4)
    action, _ = policy.predict({k: v.numpy() for k, v in obs.items()}, deterministic=True)
    assert np.array_equal(action, policy.decide(obs).mode().numpy())
    assert torch.equal(policy.predict_values(obs), torch.zeros(4, 1))
    assert torch.equal(policy(obs)[1], torch.zeros(4, 1))


def test_an_unknown_network_is_named(make_policy: MakePolicy, observe: Observe) -> None:
    policy, obs = make_policy(), observe(1)
    obs["graph_id"][:] = 7
    with pytest.raises(ConfigError, match=r"graph id 7: the policy knows \[0, 1, 2\]"):
        policy(obs)


def test_state_dependent_noise_is_refused(make_policy: MakePolicy) -> None:
    policy = make_policy()
    with pytest.raises(ConfigError, match="use_sde"):
        ChannelPruningPolicy(
            policy.observation_space,
            policy.action_space,
            lambda _: 1e-3,
            thresholds=policy.thresholds,
            network_config=policy.network_config,
            use_sde=True,
        )
