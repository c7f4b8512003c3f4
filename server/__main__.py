"""`python -m server` is `cottention`."""

from server.cli import run

if __name__ == "__main__":
    run()
