"""Endpoints of encoders, and of models that embed: embeddings and masks."""
