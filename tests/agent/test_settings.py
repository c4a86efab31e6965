import pytest

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.options import AgentOptions
from prunegraph.agent.policies import TrainedPolicy
from prunegraph.agent.settings import agent_config, calm, wide
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ArtefactError

HALF, LESS = Budget(keep_macs=0.5), Budget(keep_macs=0.29)


def searched(policy: TrainedPolicy | None, *budgets: Budget) -> PPOConfig:
    options = AgentOptions(surrogate_steps=0, swaps=0)
    return agent_config(options, 0, initial=policy, budgets=budgets).ppo


def learned(*budgets: object) -> TrainedPolicy:
    record = {"budgets": list(budgets)} if budgets else {}
    return TrainedPolicy(PruningNetwork(NetworkConfig()).eval(), record)


@pytest.mark.parametrize("budgets", [(HALF,), (HALF, LESS), (Budget(keep_params=0.1),)])
def test_a_search_from_a_policy_is_calm_within_what_it_was_taught(
    budgets: tuple[Budget, ...],
) -> None:
    assert searched(learned({"keep_macs": 0.29}, {"keep_macs": 0.7}), *budgets) == calm(
        searched(None)
    )


def test_below_it_the_allocation_is_explored_as_from_a_heuristic() -> None:
    policy, alone = learned({"keep_macs": 0.3}, {"keep_macs": 0.7}), searched(None)
    ppo = searched(policy, HALF, LESS)
    assert ppo == wide(alone) != calm(alone)
    assert ppo.group_noise_start == alone.group_noise_start
    assert ppo.temperature_start == calm(alone).temperature_start


def test_a_policy_of_no_known_budgets_counts_as_taught() -> None:
    assert searched(learned(), LESS) == calm(searched(None))


@pytest.mark.parametrize(
    "budget", [{"keep_macs": "0.3"}, {"keep_macs": 30.0}, {"keep": 0.3}, {}, 0.3]
)
def test_a_record_of_other_budgets_is_refused(budget: object) -> None:
    with pytest.raises(ArtefactError, match="the policy's record: budgets"):
        searched(learned(budget), LESS)
