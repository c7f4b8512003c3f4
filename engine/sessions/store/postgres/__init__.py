"""Sessions in PostgreSQL, for several servers at once. Needs the extra `cluster`."""
