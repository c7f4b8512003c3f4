"""Log-probabilities and ranks of given ids, by hand."""

import torch

from cottention.engine.sampling.logprobs import gather_logprobs


def test_a_rank_counts_what_is_likelier_in_the_top_and_beyond_it() -> None:
    logits = torch.tensor([[0.5, 4.0, -1.0, 2.0], [0.5, 4.0, -1.0, 2.0], [3.0, 1.0, 2.0, 0.0]])
    scores = gather_logprobs(logits, [2, 1, 1], 2)
    assert [one.rank for one in scores] == [4, 1, 3]
    assert [[token_id for token_id, _ in one.top] for one in scores] == [[1, 3], [1, 3], [0, 2]]
    assert [one.logprob for one in scores] == logits.log_softmax(-1)[[0, 1, 2], [2, 1, 1]].tolist()


def test_equals_share_a_rank() -> None:
    scores = gather_logprobs(torch.tensor([[1.0, 5.0, 1.0, 0.0]] * 2), [0, 2], 0)
    assert [one.rank for one in scores] == [2, 2]
