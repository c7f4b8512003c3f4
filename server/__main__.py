"""`python -m cottention.server` is `cottention`."""

from cottention.server.cli.main import run

if __name__ == "__main__":
    run()
