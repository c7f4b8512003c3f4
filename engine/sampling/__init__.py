"""Logits to ids: masks, bias, penalties, filters, sampling, log-probabilities."""
