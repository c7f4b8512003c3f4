"""The HTTP face and the command line of a Cottention engine. Knows no torch."""
