"""Compiles grammars of requests on trial, in a process that may run out of time, memory or stack.

llguidance bounds most of its work, and not all of it: some schemas take minutes, and some grammars
more stack than a thread has, which ends the process. What the trial survives, the engine compiles.

`main` is the process: it reads the tokenizer and then grammars from its standard
input, and answers each on its standard output.
"""

import contextlib
import os
import pickle
import re
import resource
import select
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, NamedTuple

from cottention.engine.grammar.lark import Specials, library_grammar
from cottention.engine.grammar.library import Vocabulary, compile_grammar, library_tokenizer
from cottention.engine.structured_output import StructuredOutput, TextStructure

START_SECONDS = 120.0
"""For the process to begin, on a machine that does other things as well."""

PROGRAM = f"from {__name__} import main; main()"

STACK_BYTES = 1024**2
"""Of the thread that compiles on trial: less than the engine's threads have."""


class Limits(NamedTuple):
    """Bounds on a grammar. seconds, memory: of its compilation, the memory in bytes."""

    seconds: float
    memory: int


class Verdict(NamedTuple):
    """The library's form of a grammar that compiles; or what is wrong with it."""

    grammar: str = ""
    error: str = ""


class Trial:
    """The process, as the engine sees it. It starts when it is first needed, and after its end.

    May be used from any thread; grammars are tried one after the other.
    """

    def __init__(self, vocabulary: Vocabulary, limits: Limits) -> None:
        self._vocabulary = vocabulary
        self._limits = limits
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, structure: StructuredOutput) -> Verdict:
        """Compile a grammar within the limits."""
        with self._lock:
            process = self._process or self._start()
            _send(process, structure)
            verdict = _receive(process, self._limits.seconds)
            if isinstance(verdict, Verdict):
                return verdict
            self._end()
        if verdict is None:
            return Verdict(error=f"it takes more than {self._limits.seconds:g} seconds to compile")
        return Verdict(
            error=f"it needs more than {self._limits.memory // 1024**2} MiB to compile, or is"
            " nested too deeply"
        )

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", PROGRAM, str(self._limits.memory)]
        paths = os.pathsep.join(each for each in sys.path if each)
        self._process = process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
        )
        _send(process, self._vocabulary)
        if not isinstance(_receive(process, START_SECONDS), Verdict):
            self._end()
            raise RuntimeError("the process that compiles grammars does not start")
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was not written is lost with the process
                    pipe and pipe.close()


def _send(process: subprocess.Popen[bytes], message: Any) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # noticed when the answer is read
        pickle.dump(message, process.stdin)
        process.stdin.flush()


def _receive(process: subprocess.Popen[bytes], seconds: float) -> "Verdict | bool | None":
    """The answer; None if there is none in time, False if there will be none."""
    assert process.stdout is not None
    if not select.select([process.stdout], [], [], seconds)[0]:
        return None
    try:
        verdict: Verdict = pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError):
        return False
    return verdict


# In the process


def _try(structure: StructuredOutput, specials: Specials, tokenizer: Any) -> Verdict:
    """Narrowed, or as it was given where that leaves no text.

    Branches of `oneOf` that exclude each other when they are narrowed may overlap as they were
    given: those are tried first as they were given.
    """
    if "oneOf" in _description(structure):
        given = _try_one(structure, specials, tokenizer, is_narrowed=False)
        if given.error:
            return given
    found = _try_one(structure, specials, tokenizer, is_narrowed=True)
    if not found.error:
        return found
    return _try_one(structure, specials, tokenizer, is_narrowed=False)


def _description(structure: StructuredOutput) -> str:
    """All schemas of a structure."""
    if isinstance(structure, TextStructure):
        return structure.text
    return "".join(call.schema for call in structure.calls)


def _try_one(
    structure: StructuredOutput, specials: Specials, tokenizer: Any, *, is_narrowed: bool
) -> Verdict:
    try:
        grammar = library_grammar(structure, specials, is_narrowed=is_narrowed)
        matcher = compile_grammar(tokenizer, grammar)
        error = matcher.get_error() or _first_mask_error(matcher)
    except MemoryError:
        os._exit(1)
    except Exception as found:
        error = str(found) or type(found).__name__
    return Verdict(error=_one_line(error)) if error else Verdict(grammar)


def _first_mask_error(matcher: Any) -> str:
    """What is wrong where a grammar compiles and no text begins as it says; else empty."""
    is_empty = not any(matcher.compute_bitmask())
    error = str(matcher.get_error())
    return "no text matches it" if is_empty or error.startswith("NoExtension") else error


def _one_line(error: str) -> str:
    """The part of an error that tells what is wrong, without the grammar around it."""
    _, is_regex, reason = error.partition("regex parse error:")
    if is_regex and (found := re.search(r"^error: (.+)$", reason, re.MULTILINE)):
        error = f"the regular expression is not valid: {found[1]}"
    text = " ".join(error.replace("<non-verbose/>", "").split())
    return text if len(text) <= MAX_ERROR else f"{text[:MAX_ERROR]} ..."


MAX_ERROR = 300


def _serve(source: IO[bytes], sink: IO[bytes], memory: int) -> None:
    vocabulary: Vocabulary = pickle.load(source)
    of_byte = {each[0]: i for i, each in enumerate(vocabulary.token_bytes) if len(each) == 1}
    tokenizer = library_tokenizer(
        vocabulary, lambda text: [of_byte[each] for each in text.encode() if each in of_byte]
    )
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + memory, held + memory))
    verdict = Verdict()
    while True:
        pickle.dump(verdict, sink)
        sink.flush()
        try:
            structure: StructuredOutput = pickle.load(source)
        except EOFError:
            return
        verdict = _try(structure, vocabulary.specials, tokenizer)


def main() -> None:
    """Serve standard input until its end, in a thread with a small stack."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    memory = int(sys.argv[1])
    arguments = (sys.stdin.buffer, sys.stdout.buffer, memory)
    worker = threading.Thread(target=_serve, args=arguments)
    worker.start()
    worker.join()
