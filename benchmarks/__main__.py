"""Runs all benchmarks in turn: `python -m benchmarks [--quick] [--json FILE]`."""

from benchmarks import (
    decode,
    engine_steps,
    families,
    heavy_grammar,
    host_loop,
    long_prefill,
    memory,
    position,
    products,
    renewal,
    response_chain,
    sampling,
    serving,
    sessions,
    shared_prefix,
    start,
    step,
    structured,
)
from benchmarks.common import Report, machine, parser, write_json

BENCHMARKS = (
    start,
    step,
    decode,
    products,
    engine_steps,
    families,
    sampling,
    host_loop,
    serving,
    shared_prefix,
    long_prefill,
    position,
    memory,
    sessions,
    response_chain,
    renewal,
    structured,
    heavy_grammar,
)


def main() -> None:
    """Run them in this process; each prints its tables."""
    arguments = parser(__doc__).parse_args()
    report: Report = {"machine": machine()}
    for benchmark in BENCHMARKS:
        report |= benchmark.measure(arguments.quick)
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
