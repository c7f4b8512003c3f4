"""API keys, and what each may use."""
