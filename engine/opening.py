"""Opens the engine that a model needs."""

from pathlib import Path

from cottention.engine.config import EngineConfig
from cottention.engine.encoder_engine import EncoderEngine
from cottention.engine.engine import Engine
from cottention.engine.models.model_folder import resolve_model
from cottention.engine.models.registry import read_config
from cottention.engine.text.files import ignore


def open_engine(
    model: str | Path | None = None, config: EngineConfig | None = None
) -> Engine | EncoderEngine:
    """The engine of a model that generates text, or of an encoder, as its config.json says.

    Raises ModelFolderError, ConfigurationError or OutOfMemoryError.
    """
    if read_config(resolve_model(model).folder, ignore).is_encoder:
        return EncoderEngine(model, config)
    return Engine(model, config)
