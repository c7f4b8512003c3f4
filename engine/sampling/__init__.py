"""Logits to ids: penalties, masks, filters, the draw, log-probabilities."""
