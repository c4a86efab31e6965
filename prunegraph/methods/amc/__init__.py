"""AMC: a DDPG agent decides layer by layer."""
