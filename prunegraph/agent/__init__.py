"""The agent: graph encoder, policy over keep bits, constrained PPO, saving."""

from prunegraph.agent.amortise import Lesson, amortise, num_steps, with_share
from prunegraph.agent.network import NetworkConfig, PruningNetwork
from prunegraph.agent.ppo import ChannelPPO
from prunegraph.agent.ppo_config import PPOConfig
from prunegraph.agent.saving import TrainedPolicy, load_policy, save_policy
from prunegraph.agent.topology import Topology
from prunegraph.agent.train import AgentConfig, TrainingResult, train_agent
from prunegraph.agent.vec_env import SelfCompetitionVecEnv
from prunegraph.rewards import CONTEXT_NAMES

__all__ = [
    "CONTEXT_NAMES",
    "AgentConfig",
    "ChannelPPO",
    "Lesson",
    "NetworkConfig",
    "PPOConfig",
    "PruningNetwork",
    "SelfCompetitionVecEnv",
    "Topology",
    "TrainedPolicy",
    "TrainingResult",
    "amortise",
    "load_policy",
    "num_steps",
    "save_policy",
    "train_agent",
    "with_share",
]
