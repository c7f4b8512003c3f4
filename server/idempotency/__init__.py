"""Requests with an Idempotency-Key: each is executed once, and its answer repeated."""
