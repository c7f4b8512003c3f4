"""A setting's bounds and choices, and what breaking them says."""

from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"device": "tpu"}, "--device must be one of auto, cpu, cuda; it is 'tpu'"),
        ({"dtype": "float16"}, "--dtype must be one of auto, float32, bfloat16"),
        ({"max_slots": 0}, "--max-slots must be at least 1; it is 0"),
        ({"state_memory": -1}, "--state-memory must be at least 1"),
        ({"max_batch_tokens": 1}, "--max-batch-tokens must be at least 2"),
        ({"max_tokens_limit": 0}, "--max-tokens-limit must be at least 1"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"max_slots": 1, "state_memory": 1}, "--max-slots or --state-memory, not both"),
    ],
)
def test_what_is_not_allowed_is_named(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        EngineConfig(**setting)
    assert words in str(caught.value)


def test_bounds_themselves_are_allowed() -> None:
    EngineConfig(max_slots=1, max_batch_tokens=2, max_tokens_limit=1, threads=1)
    EngineConfig(state_memory=1)
