"""The servers that share the sessions: relays to them, and turns that they leave behind."""
