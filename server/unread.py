"""What an output takes while nobody reads it. Does not know who should."""

from cottention.engine.outputs import Output

ID_BYTES = 8
LOGPROB_BYTES = 128


def size_of(output: Output) -> int:
    """Bytes, about."""
    text = output.text
    size = len(text) if text.isascii() else len(text.encode("utf-8", errors="replace"))
    if output.logprobs:
        size += LOGPROB_BYTES * sum(1 + len(each.top) for each in output.logprobs)
    return size + ID_BYTES * len(output.token_ids)
