"""Calls of functions: how they are written, and how they are read from an answer."""
