"""Benchmarks of the server. Each reports ratios to a baseline measured in the same run."""
