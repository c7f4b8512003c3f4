"""Turns of sessions: their queue, their end, their events, and the store's folder."""
