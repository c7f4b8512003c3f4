"""What several engine tests make by hand."""

import functools
from pathlib import Path

from engine.choice import Choice
from engine.params import SamplingParams
from engine.request import Request
from engine.runner import Result, Sample
from engine.sampler import Drawn
from engine.tokenizer import Tokenizer

_FOLDER = Path(__file__).parents[1] / "data" / "golden" / "cottention-gptj"


@functools.cache
def small_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(_FOLDER)


def make_request(name: str, prompt_ids: list[int], params: SamplingParams) -> Request:
    """A request that nobody has worked on."""
    return Request.new(name, prompt_ids, params, small_tokenizer(), ())


def drew(ids: dict[Choice, int]) -> Result:
    """A step in which each choice drew this id."""
    return Result([Sample(choice, Drawn(i, None)) for choice, i in ids.items()], [], {})
