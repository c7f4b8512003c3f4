"""The other end of the wire: what `chat`, `generate --url` and `bench` ask a server with."""
