"""What a network costs: multiply-adds, parameters, memory, latency."""
