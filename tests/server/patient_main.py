"""`cottention` with more time for the last events of cancelled streams, for a busy machine."""

from cottention.server.cli import serve
from cottention.server.cli.main import run

serve.FINAL_EVENT_SECONDS = 3.0

if __name__ == "__main__":
    run()
