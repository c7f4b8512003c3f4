"""Loads an encoder: from its name and the engine's settings to a pool and a runner."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from cottention.engine import ops
from cottention.engine.config import EngineConfig
from cottention.engine.encoding import Pooling
from cottention.engine.errors import ConfigurationError
from cottention.engine.execution.encoder_runner import EncoderRunner
from cottention.engine.execution.loading import DTYPES, device_of, dtype_of, pooling_of
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.config import ModelConfig
from cottention.engine.models.encoder import ServedEncoder
from cottention.engine.models.model_folder import resolve_model
from cottention.engine.models.registry import family_of, read_config
from cottention.engine.state.pool import StatePool
from cottention.engine.text.encoder_tokenizer import EncoderTokenizer

STREAM_BYTES = 4
"""Of one channel of a token's stream, which is float32 whatever the weights are."""


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """An encoder ready to run. max_long_tokens: of the long texts in memory at the same time."""

    name: str
    device: str
    dtype: str
    num_parameters: int
    model_config: ModelConfig
    tokenizer: EncoderTokenizer
    pooling: Pooling
    max_long_tokens: int
    runner: EncoderRunner


def load_encoder(model: str | Path | None, config: EngineConfig) -> LoadedEncoder:
    """Read a model folder and allocate its pool.

    Raises ModelFolderError, ConfigurationError or OutOfMemoryError.
    """
    name, folder = resolve_model(model)
    model_config = read_config(folder)
    model_config.check_served(str(folder))
    spec = model_config.state_spec()
    num_slots = config.num_slots(spec)
    device = device_of(config)
    dtype = dtype_of(config, device, model_config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    pooling = pooling_of(config, folder)
    tokenizer = EncoderTokenizer.from_folder(folder, model_config.vocab_size)
    weights = load_model(folder, model_config, DTYPES[dtype])
    num_parameters = sum(weight.numel() for weight in weights.parameters())
    with ops.eight_bit_weights(dtype == "int8"):
        serve = family_of(model_config).implementation().serve
        served = cast(ServedEncoder, serve(weights, device))
    max_long_tokens = config.encoder_memory // (STREAM_BYTES * served.width)
    if max_long_tokens <= config.max_batch_tokens < (model_config.max_exact_length or 0):
        raise ConfigurationError(
            f"--encoder-memory {config.encoder_memory} holds {max_long_tokens} tokens of this"
            f" model: give more than for --max-batch-tokens ({config.max_batch_tokens})"
        )
    return LoadedEncoder(
        name=name,
        device=device,
        dtype=dtype,
        num_parameters=num_parameters,
        model_config=model_config,
        tokenizer=tokenizer,
        pooling=pooling,
        max_long_tokens=max_long_tokens,
        runner=EncoderRunner(
            served,
            StatePool(spec, num_slots, device),
            device,
            token_ids=tokenizer.token_ids,
            chunk_tokens=config.max_batch_tokens,
            pooling=pooling,
            normalize=config.normalize_embeddings,
        ),
    )
