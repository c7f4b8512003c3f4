"""Benchmarks of the server. Each reports ratios to a baseline measured in the same run."""

# Before torch: it settles how long torch's threads spin, as it does in the server.
import cottention.engine  # noqa: F401
