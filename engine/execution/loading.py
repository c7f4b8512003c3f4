"""Loads a model: from its name and the engine's settings to a pool and a runner.

The model's family, device, dtype and context policy are chosen here.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError, ModelFolderError
from cottention.engine.execution.model_runner import ModelRunner
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.config import ModelConfig
from cottention.engine.models.model_folder import resolve_model
from cottention.engine.models.registry import family_of, read_config
from cottention.engine.sampling.sampler import Sampler
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.pool import StatePool
from cottention.engine.text.tokenizer import Tokenizer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and the pool that it runs on.

    context_policy: of requests that do not name one.
    """

    name: str
    folder: Path
    device: str
    dtype: str
    num_parameters: int
    model_config: ModelConfig
    context_policy: ContextPolicy
    tokenizer: Tokenizer
    pool: StatePool
    runner: ModelRunner


def load(model: str | Path | None, config: EngineConfig) -> LoadedModel:
    """Read a model folder and allocate its pool.

    Raises ModelFolderError, ConfigurationError or OutOfMemoryError.
    """
    name, folder = resolve_model(model)
    model_config = read_config(folder)
    model_config.check_served(str(folder))
    context_policy = _context_policy(config, model_config)
    spec = model_config.state_spec(has_spare=context_policy == "renew")
    num_slots = config.num_slots(spec)
    device = _device(config)
    dtype = _dtype(config, device, model_config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = _tokenizer(folder, model_config)
    weights = load_model(folder, model_config, _DTYPES[dtype])
    num_parameters = sum(weight.numel() for weight in weights.parameters())
    served = family_of(model_config).implementation().serve(weights, device)
    pool = StatePool(spec, num_slots, device)
    sampler = Sampler(tokenizer.sampleable_ids, model_config.vocab_size, device)
    return LoadedModel(
        name=name,
        folder=folder,
        device=device,
        dtype=dtype,
        num_parameters=num_parameters,
        model_config=model_config,
        context_policy=context_policy,
        tokenizer=tokenizer,
        pool=pool,
        runner=ModelRunner(served, pool, sampler, device),
    )


def _context_policy(config: EngineConfig, model_config: ModelConfig) -> ContextPolicy:
    """auto is the default of the model's family."""
    if config.context_policy == "auto":
        return family_of(model_config).context_policy
    return config.context_policy


def _device(config: EngineConfig) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch sees no CUDA device; give --device cpu")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def _dtype(config: EngineConfig, device: str, model_config: ModelConfig) -> str:
    """auto is float32 on a CPU, where its bits are reproducible, and the checkpoint's on CUDA."""
    if config.dtype != "auto":
        return config.dtype
    stored = model_config.torch_dtype
    return stored if device == "cuda" and stored in _DTYPES else "float32"


def _tokenizer(folder: Path, model_config: ModelConfig) -> Tokenizer:
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.num_ids > model_config.vocab_size:
        raise ModelFolderError(
            f"{folder}: the tokenizer has ids up to {tokenizer.num_ids - 1}, the model only"
            f" {model_config.vocab_size} embeddings (vocab_size)"
        )
    return tokenizer
