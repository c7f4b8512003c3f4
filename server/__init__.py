"""The HTTP server and the command line of the engine. Loads no torch."""
