"""The state of a session: its shape, the pool, the context window, the cache of prompts' states."""
