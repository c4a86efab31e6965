"""What tests and benchmarks share: an environment whose best mask is known, random networks."""
