"""Bodies of requests and of responses, as pydantic models."""
