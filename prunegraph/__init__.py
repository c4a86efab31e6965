"""prunegraph: a reinforcement-learning agent that prunes neural networks."""
