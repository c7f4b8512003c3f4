"""Responses of /v1/responses: their objects and events, where they are kept, those that run."""
