"""Loads a model: from its name and the engine's settings to a pool and a runner.

The model's family, device, dtype and context policy are chosen here. What encoders have in common
with it, `encoder_loading.py` takes from here.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from cottention.engine import ops
from cottention.engine.config import EngineConfig
from cottention.engine.encoding import Pooling
from cottention.engine.errors import ConfigurationError, ModelFolderError, ParameterError
from cottention.engine.execution.device import use_exact_products
from cottention.engine.execution.model_runner import ModelRunner
from cottention.engine.execution.step_memory import longest_batch_bytes, step_memory
from cottention.engine.models.checkpoint import load_model
from cottention.engine.models.config import ModelConfig
from cottention.engine.models.family import DelayingModel, EmbeddingModel
from cottention.engine.models.generation_config import (
    FILE_NAME,
    SAMPLING_FIELDS,
    GenerationConfig,
    read_generation_config,
)
from cottention.engine.models.model_folder import resolve_model
from cottention.engine.models.pooling import read_pooling
from cottention.engine.models.registry import family_of, read_config
from cottention.engine.sampling.pooling import Pooler
from cottention.engine.sampling.sampler import Sampler
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.state.context_window import ContextPolicy
from cottention.engine.state.pool import StatePool
from cottention.engine.text.base import BaseTokenizer
from cottention.engine.text.read_tokenizer import read_tokenizer

_log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.bfloat16,
}
"""In which weights are read, by the setting; int8 quantizes those that the family has in it."""

WITHOUT_OPS = "missing or turned off by COTTENTION_OPS=reference: `cottention build` builds them"


@dataclass(frozen=True, slots=True)
class Placed:
    """A model's files, and where and in which type it runs."""

    name: str
    folder: Path
    device: str
    dtype: str
    storage: ops.StorageKind
    model_config: ModelConfig


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, and the pool that it runs on.

    placed: its configuration has the ends of text of all files. context_policy: of requests that do
    not name one. default_sampling_params: fields of SamplingParams for requests that do not name
    them.
    """

    placed: Placed
    num_parameters: int
    context_policy: ContextPolicy
    tokenizer: BaseTokenizer
    default_sampling_params: Mapping[str, Any]
    pool: StatePool
    runner: ModelRunner


def load(model: str | Path | None, config: EngineConfig) -> LoadedModel:
    """Read a model and allocate its pool.

    Raises ModelFolderError, ConfigurationError or OutOfMemoryError.
    """
    placed = place(model, config)
    folder, model_config, device = placed.folder, placed.model_config, placed.device
    if model_config.is_encoder:
        raise ModelFolderError(
            f"{folder}: this is an encoder, which does not generate text: `cottention serve` serves"
            " its embeddings and its predictions of masked tokens"
        )
    context_policy = _context_policy(config, model_config)
    spec = model_config.state_spec(has_spare=context_policy == "renew")
    config.num_slots(spec)  # refuses memory that holds none, before weights are read
    tokenizer = _tokenizer(folder, config.tokenizer, model_config)
    generation_config = read_generation_config(folder)
    model_config = _with_all_ends(model_config, generation_config, tokenizer, folder)
    placed = replace(placed, model_config=model_config)
    served, num_parameters = serve(placed)
    if config.embeddings and not isinstance(served, EmbeddingModel):
        raise ConfigurationError(
            f"--embeddings: models of type {model_config.model_type} give no embeddings"
        )
    new_pooler = partial(Pooler, pooling_of(config, folder), normalize=config.normalize_embeddings)
    if isinstance(served, DelayingModel) and served.delays_updates:
        spec = replace(spec, delayed_updates=ops.num_delayed_updates())
    num_slots = config.num_slots(spec)
    sampler = Sampler(tokenizer.sampleable_ids, model_config.vocab_size, device)

    def new_runner(pool: StatePool) -> ModelRunner:
        return ModelRunner(served, pool, sampler, device, new_pooler)

    max_tokens = config.max_batch_tokens
    max_length = model_config.longest_prompt_part(max_tokens)
    layers = longest_batch_bytes(new_runner, spec, device, max_tokens, max_length)
    reserve = step_memory(device, num_slots, model_config.vocab_size, layers)
    level = logging.INFO if device.startswith("cuda") else logging.DEBUG  # little on a CPU
    _log.log(level, "kept free beside weights and states: %s", reserve)
    pool = StatePool(spec, num_slots, device, reserve.nbytes)
    return LoadedModel(
        placed=placed,
        num_parameters=num_parameters,
        context_policy=context_policy,
        tokenizer=tokenizer,
        default_sampling_params=_sampling_defaults(config, generation_config, folder),
        pool=pool,
        runner=new_runner(pool),
    )


def place(model: str | Path | None, config: EngineConfig) -> Placed:
    """Read a model's configuration, choose where it runs, and set the number of threads.

    Raises ModelFolderError or ConfigurationError.
    """
    name, folder = resolve_model(model)
    model_config = read_config(folder)
    model_config.check_served(str(folder))
    device = _device(config)
    dtype = _dtype(config, device, model_config)
    storage = _storage(config, device)
    use_exact_products(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return Placed(name, folder, device, dtype, storage, model_config)


def serve(placed: Placed) -> tuple[Any, int]:
    """The model arranged for inference, and its number of parameters. Raises ModelFolderError."""
    weights = load_model(placed.folder, placed.model_config, DTYPES[placed.dtype])
    num_parameters = sum(weight.numel() for weight in weights.parameters())
    implementation = family_of(placed.model_config).implementation()
    with ops.weight_storage(placed.storage) as storage:
        served = implementation.serve(weights, placed.device)
    if storage.kind == "compressed":
        _tell_compressed(storage)
    return served, num_parameters


def _tell_compressed(storage: ops.WeightStorage) -> None:
    found, total = storage.num_compressed, storage.num_matrices
    if found:
        _log.info("--compress-weights: %d of %d matrices are compressed", found, total)
    else:
        _log.warning(
            "--compress-weights: none of %d matrices is compressed: float32 values that bfloat16"
            " does not have are not (--dtype bfloat16 rounds them), nor are values that are spread"
            " over many exponents, nor matrices so small that it would not save a tenth",
            total,
        )


def _context_policy(config: EngineConfig, model_config: ModelConfig) -> ContextPolicy:
    """auto is the default of the model's family."""
    if config.context_policy == "auto":
        return family_of(model_config).context_policy
    if config.context_policy == "renew" and model_config.window is None:
        raise ConfigurationError(
            "--context-policy renew: the files of this model do not say how many tokens it was"
            " trained to follow; give --context-policy exact"
        )
    return config.context_policy


def pooling_of(config: EngineConfig, folder: Path) -> Pooling:
    """The setting; auto is what the folder says, else the mean. Raises ModelFolderError."""
    if config.pooling != "auto":
        return config.pooling
    return cast(Pooling, read_pooling(folder) or "mean")


def _device(config: EngineConfig) -> str:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("--device cuda: torch sees no CUDA device; give --device cpu")
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


def _dtype(config: EngineConfig, device: str, model_config: ModelConfig) -> str:
    """auto is float32 on a CPU, where its bits are reproducible, and the checkpoint's on CUDA.

    Raises ConfigurationError.
    """
    if config.dtype == "int8" and device != "cpu":
        raise ConfigurationError(
            f"--dtype int8: weights of eight bits are multiplied on the CPU only, not on {device};"
            " give --device cpu, or --dtype bfloat16"
        )
    if config.dtype == "int8" and ops.backend() != "compiled":
        raise ConfigurationError(
            f"--dtype int8 needs the compiled ops, which are {WITHOUT_OPS}; or give another --dtype"
        )
    if config.dtype != "auto":
        return config.dtype
    stored = model_config.torch_dtype
    return stored if device == "cuda" and stored in DTYPES else "float32"


def _storage(config: EngineConfig, device: str) -> ops.StorageKind:
    """How matrices are kept. Raises ConfigurationError where none can be compressed."""
    if not config.compress_weights:
        return "int8" if config.dtype == "int8" else "packed"
    reason = None
    if config.dtype == "int8":
        reason = "with --dtype int8 weights take eight bits already"
    elif device != "cpu":
        reason = f"compressed weights are multiplied on the CPU only, not on {device}"
    elif ops.backend() != "compiled":
        reason = f"it needs the compiled ops, which are {WITHOUT_OPS}"
    elif not ops.has_wide_vectors():
        reason = "it needs a CPU with AVX2, without which decoding takes longer than memory"
    if reason is not None:
        raise ConfigurationError(f"--compress-weights: {reason}; leave it out")
    return "compressed"


def _tokenizer(folder: Path, chosen: str | None, model_config: ModelConfig) -> BaseTokenizer:
    tokenizer = read_tokenizer(folder, chosen, model_config.vocab_size)
    if tokenizer.num_ids > model_config.vocab_size:
        raise ModelFolderError(
            f"{folder}: the tokenizer has ids up to {tokenizer.num_ids - 1}, the model only"
            f" {model_config.vocab_size} embeddings (vocab_size)"
        )
    tokenizer.cover(model_config.vocab_size)
    return tokenizer


def _with_all_ends(
    model_config: ModelConfig, generation: GenerationConfig, tokenizer: BaseTokenizer, folder: Path
) -> ModelConfig:
    """The configuration with the ends of text that all files name."""
    ends = [*model_config.eos_token_ids, *generation.eos_token_ids]
    if tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    whole = replace(model_config, eos_token_ids=tuple(dict.fromkeys(ends)))
    unreachable = sorted(set(whole.eos_token_ids) - set(whole.reachable_ends))
    if unreachable:
        _log.warning(
            "%s: eos_token_id names ids that the model does not have, which are ignored: %s",
            folder,
            ", ".join(map(str, unreachable)),
        )
    return whole


def _sampling_defaults(
    config: EngineConfig, generation: GenerationConfig, folder: Path
) -> dict[str, Any]:
    """What generation_config.json sets, without the values that no request may have."""
    if config.generation_config == "vllm":
        return {}
    defaults: dict[str, Any] = {}
    for name, value in generation.sampling.items():
        param = SAMPLING_FIELDS[name]
        try:
            SamplingParams(**{param: value})  # type: ignore[arg-type]  # this is the check
            if value == 0 and param == "max_tokens":
                raise ParameterError(param, f"{param} must be a whole number from 1; it is 0")
        except ParameterError as error:
            reason = str(error).replace(param, name)
            _log.warning("%s: %s; it is ignored", folder / FILE_NAME, reason)
        else:
            defaults[param] = value
    if "max_tokens" in defaults:
        defaults["max_tokens"] = min(defaults["max_tokens"], config.max_tokens_limit)
    if defaults:
        _log.info(
            "sampling defaults of %s: %s; --generation-config vllm ignores them",
            folder / FILE_NAME,
            ", ".join(f"{name} {value}" for name, value in defaults.items()),
        )
    return defaults
