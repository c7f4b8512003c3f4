"""From a batch to sampled ids: loading a model, running it, CUDA graphs."""
