"""Loads an encoder: from its name and the engine's settings to a pool and a runner."""

from dataclasses import dataclass
from pathlib import Path

from cottention.engine.config import EngineConfig
from cottention.engine.encoding import Pooling
from cottention.engine.errors import ConfigurationError
from cottention.engine.execution.encoder_runner import MASKS_TOGETHER, EncoderRunner
from cottention.engine.execution.loading import Placed, place, pooling_of, serve
from cottention.engine.execution.step_memory import step_memory
from cottention.engine.state.pool import StatePool
from cottention.engine.text.encoder_tokenizer import EncoderTokenizer

STREAM_BYTES = 4
"""Of one channel of a token's stream, which is float32 whatever the weights are."""


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """An encoder ready to run. max_long_tokens: of the long texts in memory at the same time."""

    placed: Placed
    num_parameters: int
    tokenizer: EncoderTokenizer
    pooling: Pooling
    max_long_tokens: int
    runner: EncoderRunner


def load_encoder(model: str | Path | None, config: EngineConfig) -> LoadedEncoder:
    """Read a model folder and allocate its pool.

    Raises ModelFolderError, ConfigurationError or OutOfMemoryError.
    """
    placed = place(model, config)
    folder, model_config, device = placed.folder, placed.model_config, placed.device
    spec = model_config.state_spec()
    num_slots = config.num_slots(spec)
    pooling = pooling_of(config, folder)
    tokenizer = EncoderTokenizer.from_folder(folder, model_config.vocab_size)
    served, num_parameters = serve(placed)
    max_long_tokens = config.encoder_memory // (STREAM_BYTES * served.width)
    if max_long_tokens <= config.max_batch_tokens < (model_config.max_exact_length or 0):
        raise ConfigurationError(
            f"--encoder-memory {config.encoder_memory} holds {max_long_tokens} tokens of this"
            f" model: give more than for --max-batch-tokens ({config.max_batch_tokens})"
        )
    reserve = step_memory(device, MASKS_TOGETHER, model_config.vocab_size)
    return LoadedEncoder(
        placed=placed,
        num_parameters=num_parameters,
        tokenizer=tokenizer,
        pooling=pooling,
        max_long_tokens=max_long_tokens,
        runner=EncoderRunner(
            served,
            StatePool(spec, num_slots, device, reserve.nbytes),
            device,
            token_ids=tokenizer.token_ids,
            chunk_tokens=config.max_batch_tokens,
            pooling=pooling,
            normalize=config.normalize_embeddings,
        ),
    )
