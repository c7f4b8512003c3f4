"""From a validated request to a streamed response."""
