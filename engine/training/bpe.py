"""The byte-level BPE of a trained model: made from the training files, loaded by any tool.

Owns the tokenizer's form. Knows nothing of windows or models.
"""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A GPT-2 style tokenizer of `vocab_size` ids, in which END_OF_TEXT has id 0.

    Every byte has an id of its own, so that any text comes back exactly.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(END_OF_TEXT, special=True, normalized=False)],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that separates texts."""
    token = tokenizer.token_to_id(END_OF_TEXT)
    assert token is not None
    return int(token)
