"""`cottention run-batch`: the requests of a file, answered into another, by a model or a server."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cottention.engine.config import EngineConfig
from cottention.engine.errors import ConfigurationError
from cottention.server.cli.progress import progress
from cottention.server.cli.terminal import note
from cottention.server.client.batch import BatchRun
from cottention.server.client.batch_files import BatchInput, BatchOutput, same_file
from cottention.server.client.client import RemoteError, key_of
from cottention.server.client.settings import BatchConfig, ClientConfig


def run_batch(
    input_path: Path,
    output_path: Path,
    client: ClientConfig,
    config: BatchConfig,
    engine_config: EngineConfig,
) -> int:
    """Answer what the output does not have yet; returns the exit status, 1 where lines failed.

    Both files are read before a model is loaded. Raises ConfigurationError, BatchError and
    RemoteError.
    """
    if same_file(input_path, output_path):
        raise ConfigurationError("--input-file and --output-file are the same file")
    batch = BatchInput(input_path)
    with BatchOutput.opened(output_path, batch.places) as output:
        num_requests, num_before = len(batch.places), len(output.done)
        if num_before:
            note(f"{num_before} of {num_requests} lines are in {output_path}; going on")
        if num_before < num_requests:
            with _server(client, config, engine_config) as (url, key):
                run = BatchRun(url, key, config.max_concurrency)
                try:
                    with progress(f"{num_requests} requests") as report:
                        report(num_before, num_requests)
                        run.run(batch, output, report)
                except RemoteError as error:
                    done = f"{len(output.done)} of {num_requests} lines are in {output_path}"
                    raise RemoteError(f"{error}; {done}: run it again to go on") from None
        if output.num_failed:
            note(f"{output.num_failed} of {num_requests} lines failed")
        return 1 if output.num_failed else 0


@contextlib.contextmanager
def _server(
    client: ClientConfig, config: BatchConfig, engine_config: EngineConfig
) -> Iterator[tuple[str, str | None]]:
    """The URL of the server to ask, and its key."""
    if client.url is not None:
        yield client.url, key_of(client)
        return
    from cottention.server.cli.embedded import embedded_server

    with embedded_server(
        config.model,
        engine_config,
        config.chat_template,
        served_model_name=config.served_model_name,
        may_be_encoder=True,
    ) as embedded:
        yield embedded.url, None
