"""Requests: validation, status, queues, batches, preemption, outputs."""
