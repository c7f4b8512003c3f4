"""Requests: validation, the queue, which of them run in a step, preemption, finished output."""
