"""The agent: graph encoder, policy over keep bits, constrained PPO, saving."""
