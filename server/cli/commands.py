"""What each command does, given its settings.

torch and the HTTP stack are imported inside of commands: they take seconds, `--help` must not.
"""

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cottention.engine.config import EngineConfig
from cottention.engine.errors import CottentionError
from cottention.engine.outputs import FinishReason, Output
from cottention.engine.sampling_params import SamplingParams
from cottention.engine.scheduling.context_policy import MAX_HELD
from cottention.engine.settings.declaration import Setting, settings_of
from cottention.engine.settings.sources import Origin, Resolved
from cottention.engine.standard_streams import write_notice, write_output
from cottention.engine.state.context_window import ContextPolicy
from cottention.server.cli.progress import loaded, progress
from cottention.server.cli.terminal import standard_input
from cottention.server.config import GENERATE_MAX_TOKENS, GenerateConfig, ServerConfig
from cottention.server.log_config import FIELDS, LogFormat

if TYPE_CHECKING:
    from cottention.engine.encoder_engine import EncoderEngine
    from cottention.engine.engine import Engine

logger = logging.getLogger("cottention")

HIDDEN = "********"
"""Stands for a secret."""


def serve(model: str | None, engine_config: EngineConfig, config: ServerConfig) -> int:
    """Serve until a signal. Limits, port, keys and folders are checked before loading the model."""
    from cottention.server.cli.open_files import connection_table, raise_open_files_limit
    from cottention.server.cli.serve import (
        listening,
        page_url,
        replica_url,
        run_server,
        url_of,
    )
    from cottention.server.cli.tls import tls_context

    table = connection_table(config, raise_open_files_limit())
    tls = tls_context(config)
    with listening(config) as sock:
        from cottention.server.cli.application import loaded_application
        from cottention.server.cli.serve import describe_access, warn_of_open_access
        from cottention.server.sessions.storage import describe_storage

        own_url = replica_url(sock, config)
        with loaded_application(model, engine_config, config, own_url) as served:
            app, engine, async_engine, has_sessions = served
            warn_of_open_access(sock, config)
            facts = {
                "sessions": describe_storage(config) if has_sessions else "none",
                "access": describe_access(sock, config),
            }
            page = page_url(sock, has_tls=tls is not None) if config.ui else None
            facts |= {} if page is None else {"page": page}
            facts["ready"] = url_of(sock, has_tls=tls is not None)
            announce = partial(_announce, engine, facts, config.log_format)
            return run_server(app, async_engine, config, sock, table, announce, tls)


def generate(prompt: str, config: GenerateConfig, engine_config: EngineConfig) -> int:
    """Print the continuation of `prompt`, or of standard input where it is "-"."""
    from cottention.engine.engine import Engine

    text = standard_input() if prompt == "-" else prompt
    _sampling_params(config, {})  # a flag that is wrong is reported before the model is loaded
    engine = loaded(Engine, config.model, engine_config)
    params = _sampling_params(config, engine.default_sampling_params)
    status = 0
    with ExitStack() as stack:
        report = stack.enter_context(progress("reading the prompt"))
        for output in engine.stream(text, params, report):
            stack.close()
            write_output(output.text)
            status |= _told_error(output)
    write_output("\n")
    return status


def _told_error(output: Output) -> int:
    """1 for an output that ends with an error, which is told."""
    if output.finish_reason is not FinishReason.ERROR:
        return 0
    write_notice(f"cottention generate: {output.error}\n", sys.stderr)
    return 1


def _sampling_params(config: GenerateConfig, defaults: Mapping[str, Any]) -> SamplingParams:
    """The flags' values, else the model's own."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p")
    given = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    whole = {"max_tokens": GENERATE_MAX_TOKENS, **defaults, **given}
    return SamplingParams(seed=config.seed, stop=config.stop, **whole)


def info(model: str | None, engine_config: EngineConfig) -> int:
    """Print a model's facts and its memory per session; allocates a pool of one slot."""
    from cottention.engine.encoder_engine import EncoderEngine
    from cottention.engine.opening import open_engine

    engine = loaded(open_engine, model, replace(engine_config, max_slots=1, state_memory=None))
    if isinstance(engine, EncoderEngine):
        facts = _encoder_facts(engine)
    else:
        facts = _facts(engine, engine_config.num_slots(engine.spec))
    for name, value in facts:
        write_output(f"{name:<18} {value}\n")
    return 0


def build() -> int:
    """Compile the ops, and those for CUDA where torch sees a device or COTTENTION_CUDA=1 is set."""
    from cottention.engine.ops.build import BuildError, build_cuda, is_cuda_wanted
    from cottention.engine.ops.build import build as build_ops

    try:
        with progress("compiling the ops") as report:
            library = build_ops(report=report)
        write_output(f"{library}\n")
        if is_cuda_wanted():
            write_output(f"{build_cuda()}\n")
    except BuildError as error:
        raise CottentionError(str(error)) from None
    return 0


def config(resolved: Sequence[Resolved[Any]], *, as_json: bool) -> int:
    """Print every setting with its value and origin; secrets are hidden."""
    rows = [
        (each, getattr(one.value, each.name), one.origins[each.name])
        for one in resolved
        for each in settings_of(one.value)
    ]
    if as_json:
        values = {row[0].name: _as_json(*row) for row in rows}
        write_output(json.dumps(values, indent=2) + "\n")
        return 0
    table = [("setting", "value", "source")]
    table += [(each.name, _shown(each, value), str(origin)) for each, value, origin in rows]
    widths = [max(len(row[column]) for row in table) for column in range(2)]
    for name, value, origin in table:
        write_output(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}\n")
    return 0


def _announce(engine: "Engine | EncoderEngine", facts: dict[str, str], form: LogFormat) -> None:
    """Print the start-up facts, or log them as one record where the log is JSON."""
    stats = engine.stats()
    facts = {
        "model": f"{engine.name}, {_on_what(engine)}",
        "memory": _pool(stats.num_slots, stats.bytes_per_slot),
    } | facts
    if form == "json":
        logger.info("serving", extra={FIELDS: facts})
        return
    lines = [f"{name:<8} {value}\n" for name, value in facts.items()]
    write_notice("".join(lines), sys.stdout)


def _shown(each: Setting, value: Any) -> str:
    return HIDDEN if each.is_secret and value else each.format(value)


def _as_json(each: Setting, value: Any, origin: Origin) -> dict[str, Any]:
    if each.is_secret and value:
        value = [HIDDEN] * len(value) if each.is_list else HIDDEN
    return {"value": value, "source": origin.kind, "name": origin.name}


def _facts(engine: "Engine", num_slots: int) -> Iterator[tuple[str, str]]:
    config, spec = engine.model_config, engine.spec
    size_of_one = spec.bytes_per_slot
    yield "model", engine.name
    yield "family", config.model_type
    yield "parameters", f"{engine.num_parameters:,}"
    yield "runs on", _on_what(engine)
    yield from config.description().items()
    spare = f" (the state and its spare, {spec.bytes_per_row:,} each)" if spec.has_spare else ""
    yield "bytes per session", f"{size_of_one:,} in a slot{spare}, whatever its length"
    yield from _costs(engine)
    yield "pool when served", _pool(num_slots, size_of_one)
    length = config.trained_length
    yield "trained length", "not known" if length is None else f"{length:,} tokens"
    yield "context policy", _policy(engine.policies.default, is_length_known=length is not None)
    yield "position limit", f"{MAX_HELD:,} tokens"


def _encoder_facts(engine: "EncoderEngine") -> Iterator[tuple[str, str]]:
    config = engine.model_config
    per_token, per_text = engine.bytes_per_token, engine.pool.spec.bytes_per_slot
    yield "model", engine.name
    yield "parameters", f"{engine.num_parameters:,}"
    yield "runs on", _on_what(engine)
    yield from config.description().items()
    yield "serves", ", ".join(engine.capabilities)
    yield "pooling", engine.pooling
    yield "bytes per text", f"{per_text:,}, and {per_token:,} for each of its tokens"
    yield "longest text", f"{engine.max_text_tokens:,} tokens"


def _policy(policy: ContextPolicy, *, is_length_known: bool) -> str:
    """What it means for a long session. Only a known length can be said to be passed."""
    if policy == "renew":
        return "renew: past the trained length the oldest tokens are forgotten, and quality stays"
    decline = "past the trained length quality declines; " if is_length_known else ""
    return f"exact: {decline}nothing is forgotten on purpose"


def _costs(engine: "Engine") -> Iterator[tuple[str, str]]:
    """Memory and disk of a session under the server's default settings, item by item."""
    from cottention.server.api.dependencies import session_bytes

    config = ServerConfig()
    cost, is_in_slot = session_bytes(engine, config), engine.spec.itemised_bytes().keys()
    where = {
        "logits": ", computed again from the last token",
        "counts": " of memory at most",
        "ids": " of memory",
        "event_log": " of memory at most",
        "turn_copy": " of memory while a turn runs",
        "checkpoints": f" of disk at most, for {config.session_checkpoints} turns",
    }
    for what, size in cost.items.items():
        yield f"  {what}", f"{size:,} bytes{'' if what in is_in_slot else where[what]}"
    num = cost.per_gb()
    yield "sessions per GB", f"{num['resident']:,}"
    yield "  parked", f"{num['parked']:,} at least, in memory"
    yield "  stored", f"{num['stored']:,} at least, on disk"


def _on_what(engine: "Engine | EncoderEngine") -> str:
    from cottention.engine.ops import backend

    return f"{engine.dtype} on {engine.device}, {backend()} ops"


def _pool(num_slots: int, bytes_per_slot: int) -> str:
    mebibytes = num_slots * bytes_per_slot / 2**20
    return f"{num_slots} slots of {bytes_per_slot:,} bytes, {mebibytes:,.1f} MiB"
