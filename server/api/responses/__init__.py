"""Endpoints of /v1/responses."""
