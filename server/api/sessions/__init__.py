"""Endpoints of sessions; a turn is a completion or a chat (`turn_response`)."""
