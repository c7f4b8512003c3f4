"""Traces for OpenTelemetry: a span for each request, and what generation did in it.

A request's span has a child named after OpenTelemetry's conventions for generative AI, with the
model, its parameters and tokens, and that has three: `queue` until the request has slots, `prefill`
until its first token, `decode` until its last. They are made when the request has ended, from the
times that the log has. Prompts and answers are in none of them.

The SDK is imported where --otlp-endpoint is given and nowhere else. Spans are sent by a
thread of its own from a queue of bounded length: what a collector does not take is dropped.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cottention.engine.errors import ConfigurationError
from cottention.server.generation.output_stream import OutputStream
from cottention.server.observability.access_log import (
    UNLOGGED_METHODS,
    RequestRecord,
    request_record,
)
from cottention.server.version import package_version

if TYPE_CHECKING:  # the extra `otel`
    from opentelemetry.trace import Span

logger = logging.getLogger("cottention")

PROVIDER = "cottention"
UNNAMED = "unknown_service"
"""What opentelemetry calls a service to which OTEL_SERVICE_NAME gives no name."""

PATH = "/v1/traces"
OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/embeddings": "embeddings",
}
"""Endpoints whose generation has a name in the conventions."""

PARAMETERS = ("max_tokens", "temperature", "top_p", "top_k", "seed")

FLUSH_SECONDS = 2.0
"""Time to send the last spans before the server ends."""

SECONDS_BETWEEN_WARNINGS = 60.0
LOGGERS = (
    "opentelemetry.exporter.otlp.common.http",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.sdk.trace.export",
)
"""Of a collector that is away they tell at each attempt."""


class Tracing:
    """Where spans go. Raises ConfigurationError without the extra `otel`, or for a wrong URL."""

    def __init__(self, endpoint: str, model: str) -> None:
        """endpoint: of a collector; /v1/traces is added where it is not there."""
        if not endpoint.startswith(("http://", "https://")):
            raise ConfigurationError(
                f"--otlp-endpoint {endpoint} is not a URL of OTLP over HTTP; give http://HOST:4318"
            )
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            raise ConfigurationError(
                f"--otlp-endpoint needs the extra otel ({error}): pip install"
                " 'cottention-server[otel]'"
            ) from None
        rarely = _Rarely()
        for name in LOGGERS:
            logging.getLogger(name).addFilter(rarely)
        resource = Resource.create({"service.version": package_version()})
        if str(resource.attributes.get("service.name", "")).startswith(UNNAMED):
            resource = resource.merge(Resource({"service.name": "cottention-server"}))
        self.model = model
        url = endpoint.rstrip("/").removesuffix(PATH) + PATH
        self._provider: TracerProvider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url)))
        self.tracer = self._provider.get_tracer("cottention.server", package_version())

    async def close(self) -> None:
        """Send the last spans, for at most FLUSH_SECONDS."""
        done, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop did not wait
                loop.call_soon_threadsafe(done.set)

        threading.Thread(target=shut_down, daemon=True).start()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), FLUSH_SECONDS)


class TracingMiddleware:
    """Makes the spans of each request that is logged; continues the trace of its `traceparent`.

    The response has the span's own `traceparent`.
    """

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._app = app
        self._tracing = tracing
        self._kind = SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http" or scope["method"] in UNLOGGED_METHODS:
            await self._app(scope, receive, send)
            return
        span = self._begin(scope)
        status = 0

        async def send_with_parent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["traceparent"] = _traceparent(span)
            await send(message)

        record = request_record(scope)
        try:
            await self._app(scope, receive, send_with_parent)
        finally:
            record.on_end(lambda: self._end_safely(span, scope, record, status))

    def _begin(self, scope: Scope) -> "Span":
        context = self._propagator.extract(dict(Headers(scope=scope)))
        attributes = {
            "http.request.method": scope["method"],
            "url.path": scope["path"],
            "url.scheme": scope["scheme"],
            "cottention.request_id": scope["state"]["request_id"],
        }
        return self._tracing.tracer.start_span(
            scope["method"], context, kind=self._kind, attributes=attributes
        )

    def _end_safely(self, span: "Span", scope: Scope, record: RequestRecord, status: int) -> None:
        """A fault here is no fault of the request."""
        try:
            self._end(span, scope, record, status)
        except Exception:
            logger.exception("the trace of a request is lost")

    def _end(self, span: "Span", scope: Scope, record: RequestRecord, status: int) -> None:
        if not span.is_recording():
            span.end()
            return
        from opentelemetry.trace import Status, StatusCode

        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            span.update_name(f"{scope['method']} {route}")
            span.set_attribute("http.route", route)
        if status:
            span.set_attribute("http.response.status_code", status)
        if record.key_name:
            span.set_attribute("cottention.key", record.key_name)
        if status >= 500 or "error" in record.finish_reason:
            span.set_status(Status(StatusCode.ERROR))
            span.set_attribute("error.type", str(status) if status >= 500 else "error")
        operation = OPERATIONS.get(scope["path"])
        for stream in record.streams:
            self._add_generation(span, operation, record, stream)
        span.end()

    def _add_generation(
        self, parent: "Span", operation: str | None, record: RequestRecord, stream: OutputStream
    ) -> None:
        """The span of what a stream generated, and its phases."""
        from opentelemetry.trace import set_span_in_context

        clock = _Clock()
        begin, end = stream.opened, stream.last_token or time.monotonic()
        span = self._tracing.tracer.start_span(
            f"{operation} {self._tracing.model}" if operation else "prefill a session",
            set_span_in_context(parent),
            attributes=self._generation_attributes(operation, record, stream),
            start_time=clock.nanoseconds(begin),
        )
        context = set_span_in_context(span)
        for name, phase in _phases(stream, end):
            one = self._tracing.tracer.start_span(
                name, context, start_time=clock.nanoseconds(phase[0])
            )
            one.end(clock.nanoseconds(phase[1]))
        span.end(clock.nanoseconds(end))

    def _generation_attributes(
        self, operation: str | None, record: RequestRecord, stream: OutputStream
    ) -> dict[str, Any]:
        model = self._tracing.model
        found: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": model,
            "gen_ai.response.model": model,
            "gen_ai.response.id": record.response_id,
            "gen_ai.response.finish_reasons": [str(each) for each in stream.reasons],
            "gen_ai.conversation.id": record.session_id,
            "gen_ai.usage.input_tokens": record.num_prompt,
            "gen_ai.usage.output_tokens": stream.num_generated,
            "gen_ai.usage.cache_read.input_tokens": stream.num_cached,
        }
        if (request := record.request) is not None and operation in ("chat", "text_completion"):
            params = request.params
            found |= {f"gen_ai.request.{name}": getattr(params, name) for name in PARAMETERS}
            found["gen_ai.request.choice.count"] = params.n if params.n > 1 else None
        if stream.first_token is not None:
            found["gen_ai.response.time_to_first_chunk"] = stream.first_token - stream.opened
        return {name: value for name, value in found.items() if value is not None}


def _phases(stream: OutputStream, end: float) -> Iterator[tuple[str, tuple[float, float]]]:
    """The phases that a stream has begun, and their times by the monotonic clock."""
    started, first = stream.started, stream.first_token
    yield "queue", (stream.opened, end if started is None else started)
    if started is not None:
        yield "prefill", (started, end if first is None else first)
    if first is not None:
        yield "decode", (first, end)


class _Clock:
    """From the monotonic clock to Unix time."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.monotonic_ns()

    def nanoseconds(self, monotonic: float) -> int:
        """A time of time.monotonic, since 1970."""
        return int(monotonic * 1e9) + self._offset


def _traceparent(span: "Span") -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


class _Rarely(logging.Filter):
    """Lets one message pass in a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -SECONDS_BETWEEN_WARNINGS

    def filter(self, _record: logging.LogRecord) -> bool:
        """Whether the record is logged."""
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_WARNINGS:
            return False
        self._last = now
        return True
