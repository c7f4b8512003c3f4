"""What is run before the first request, so that no later step takes more memory or is the first."""

from itertools import chain, repeat

from cottention.engine.sampling_params import MAX_LOGPROBS, SamplingParams

WAYS_TO_SAMPLE = (
    SamplingParams(temperature=0),
    SamplingParams(),
    SamplingParams(top_k=50, top_p=0.9),
    SamplingParams(top_p=0.9, logprobs=MAX_LOGPROBS),
)


def longest_batches(num_rows: int, max_tokens: int, max_length: int) -> list[list[int]]:
    """Lengths of the segments of steps of `max_tokens` ids that differ in what they take.

    Prompts alone, prompts beside rows that decode, and prompts of mixed lengths, which are computed
    in steps or in chunks. max_length: ids of one prompt in a step, at most. No more than num_rows.
    """
    batches = []
    for begin in ([], [1] * min(num_rows // 2, max_tokens // 2), [1, 2, 31, 33, 64, 65]):
        lengths: list[int] = []
        left = max_tokens
        for length in chain(begin, repeat(max_length)):
            if not left or len(lengths) == num_rows:
                break
            lengths.append(min(length, max_length, left))
            left -= lengths[-1]
        batches.append(lengths)
    return batches
