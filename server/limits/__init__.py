"""API keys and the limits of each."""
