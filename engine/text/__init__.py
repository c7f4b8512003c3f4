"""Tokenizer, incremental detokenizer, and text files as people save them."""
