"""Settings: declared once as dataclass fields, read from flags, variables and a TOML file."""
