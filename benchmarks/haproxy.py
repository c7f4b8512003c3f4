"""What an event of a stream costs HAProxy with docker/haproxy/haproxy.cfg: processor time.

A server that sends events of a completion's size at a fixed rate on each stream, as an engine's
steps do, and a client that reads them, both in this process; HAProxy is a process of its own, whose
times are read. `python -m benchmarks.haproxy`, where Debian's package is installed; it is not among
`python -m benchmarks`.
"""

import asyncio
import statistics
import time
from collections import Counter

import psutil

from benchmarks.common import Report, run, show
from tests.engine.postgres import free_port
from tests.server.cluster.haproxy import Balancer, running_haproxy

ADDRESSES = ["127.0.3.1", "127.0.3.2"]
STREAMS = (8, 64, 256)
EVENTS_PER_SECOND = 20
SECONDS = 8.0
ROUNDS = 3

EVENT = b"data: " + b"x" * 240 + b"\n\n"
CHUNK = b"%x\r\n%s\r\n" % (len(EVENT), EVENT)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
READY = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
BODY = b'{"stream": true, "session_id": "%d"}'


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection: checks are answered, anything else gets events until it is closed."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET"):
                writer.write(READY)
                continue
            writer.write(HEAD)
            loop = asyncio.get_running_loop()
            due = loop.time()
            while not writer.is_closing():
                due += 1 / EVENTS_PER_SECOND
                await asyncio.sleep(due - loop.time())
                writer.write(CHUNK)
    except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
        pass
    finally:
        writer.close()


async def read(port: int, index: int, counts: Counter[str]) -> None:
    """Count the bytes of a stream, and how many pieces they came in."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = BODY % index
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    try:
        await reader.readuntil(b"\r\n\r\n")
        while piece := await reader.read(65536):
            counts["bytes"] += len(piece)
            counts["pieces"] += 1
    finally:
        writer.close()


async def through(balancer: Balancer, num_streams: int, seconds: float) -> dict[str, float]:
    """Microseconds of HAProxy's processor time an event, with so many streams."""
    counts: Counter[str] = Counter()
    readers = [
        asyncio.create_task(read(balancer.port, index, counts)) for index in range(num_streams)
    ]
    await asyncio.sleep(1.0)
    process = psutil.Process(balancer.process.pid)
    counts.clear()
    before, started = process.cpu_times(), time.monotonic()
    await asyncio.sleep(seconds)
    after, took = process.cpu_times(), time.monotonic() - started
    num_events = counts["bytes"] / len(CHUNK)
    used = after.user + after.system - before.user - before.system
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    return {
        "events/s": num_events / took,
        "events a read": num_events / counts["pieces"],
        "HAProxy us/event": used / num_events * 1e6,
    }


async def rounds(seconds: float) -> list[dict[str, float]]:
    """A row for each number of streams: medians of rounds that take turns."""
    port = free_port()
    servers = [await asyncio.start_server(serve, address, port) for address in ADDRESSES]
    with running_haproxy(ADDRESSES, port) as balancer:
        while (await asyncio.to_thread(balancer.states, "sessions"))["UP"] < len(ADDRESSES):
            await asyncio.sleep(0.1)
        found: dict[int, list[dict[str, float]]] = {num: [] for num in STREAMS}
        for _ in range(ROUNDS):
            for num in STREAMS:
                found[num].append(await through(balancer, num, seconds))
    for server in servers:
        server.close()
    return [
        {"streams": num} | {name: statistics.median(row[name] for row in rows) for name in rows[0]}
        for num, rows in found.items()
    ]


def measure(quick: bool) -> Report:
    """One table."""
    rows = asyncio.run(rounds(SECONDS / 4 if quick else SECONDS))
    show(f"HAProxy: events of {len(EVENT)} bytes, {EVENTS_PER_SECOND}/s a stream", rows)
    return {"events": rows}


if __name__ == "__main__":
    run(__doc__ or "", measure)
