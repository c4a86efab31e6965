"""Rewards: pure functions of finished episodes and of what the agent remembers."""

from prunegraph.rewards.competition import SelfCompetition
from prunegraph.rewards.config import RewardConfig
from prunegraph.rewards.episode import Episode
from prunegraph.rewards.forms import FORMS, Reward, score
from prunegraph.rewards.lagrangian import LagrangianMultiplier
from prunegraph.rewards.ledger import SelfCompetitionLedger

__all__ = [
    "FORMS",
    "Episode",
    "LagrangianMultiplier",
    "Reward",
    "RewardConfig",
    "SelfCompetition",
    "SelfCompetitionLedger",
    "score",
]
