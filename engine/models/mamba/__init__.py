"""Mamba and Mamba-2: selective state spaces, under the names of transformers."""
