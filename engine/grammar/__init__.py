"""Structured output: grammars, and which ids they allow next."""
