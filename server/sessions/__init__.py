"""Turns of sessions: their queue, their life, their events."""
