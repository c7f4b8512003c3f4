"""Model families: from a model folder to logits."""
