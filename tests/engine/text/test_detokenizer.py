"""Text as it grows: what comes out does not depend on how it was cut into tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cottention.engine.text.detokenizer import Detokenizer

PIECES = st.lists(st.binary(max_size=5), max_size=12)
"""Any bytes in any tokens: most are no UTF-8."""

TEXT = st.text(alphabet="ab\né€😀\ufffd", max_size=24)
"""Few characters of every width, so that stop strings appear and overlap."""

STOPS = st.lists(st.text(alphabet="ab\né😀", min_size=1, max_size=4), max_size=4)


def run(pieces: list[bytes], stops: list[str]) -> tuple[list[str], Detokenizer]:
    """What each token emits, and at the end."""
    detokenizer = Detokenizer(pieces, stops)
    emitted = []
    for token_id in range(len(pieces)):
        emitted.append(detokenizer.push(token_id))
        if detokenizer.stop is not None:
            return emitted, detokenizer
    return [*emitted, detokenizer.finish()], detokenizer


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: text before the stop string complete first, of several the longest."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@st.composite
def cut_text(draw: st.DrawFn) -> list[bytes]:
    """A text's bytes, cut into tokens anywhere, characters included."""
    data = draw(TEXT).encode()
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=10)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@given(pieces=cut_text(), stops=STOPS)
@settings(max_examples=400, deadline=None)
def test_text_up_to_the_first_complete_stop(pieces: list[bytes], stops: list[str]) -> None:
    emitted, detokenizer = run(pieces, stops)
    whole = b"".join(pieces).decode()
    assert ("".join(emitted), detokenizer.stop is not None) == cut(whole, stops)


@given(pieces=cut_text(), stops=STOPS)
@settings(max_examples=200, deadline=None)
def test_whatever_is_emitted_is_final(pieces: list[bytes], stops: list[str]) -> None:
    """After every token: no half character, and nothing that a stop string may still take back."""
    whole = b"".join(pieces).decode()
    final, _ = cut(whole, stops)
    detokenizer = Detokenizer(pieces, stops)
    so_far = ""
    for token_id in range(len(pieces)):
        so_far += detokenizer.push(token_id)
        assert final.startswith(so_far)
        if detokenizer.stop is not None:
            break


@given(pieces=PIECES)
@settings(max_examples=300, deadline=None)
def test_any_bytes_decode_as_a_whole(pieces: list[bytes]) -> None:
    emitted, _ = run(pieces, [])
    assert "".join(emitted) == b"".join(pieces).decode("utf-8", errors="replace")


@given(pieces=PIECES, stops=STOPS)
@settings(max_examples=200, deadline=None)
def test_any_bytes_with_stops(pieces: list[bytes], stops: list[str]) -> None:
    emitted, _ = run(pieces, stops)
    assert "".join(emitted) == cut(b"".join(pieces).decode("utf-8", errors="replace"), stops)[0]


@pytest.mark.parametrize(
    ("pieces", "stops", "emitted"),
    [
        # overlapping stops: the one complete first wins, of two at once the longest
        (["abc"], ["abc", "b"], ["a"]),
        (["x", "abc"], ["c", "abc"], ["x", ""]),
        (["a", "b", "c"], ["abcd"], ["", "", "", "abc"]),
        (["aa", "ab"], ["aab"], ["", "a"]),
        # several stops in one token
        (["one\ntwo\n\n"], ["\n\n", "\n"], ["one"]),
        # a start of a stop that comes to nothing is let go at once
        (["a", "x"], ["ab"], ["", "ax", ""]),
    ],
)
def test_stops(pieces: list[str], stops: list[str], emitted: list[str]) -> None:
    assert run([piece.encode() for piece in pieces], stops)[0] == emitted


def test_stop_that_begins_inside_a_token_half_way_through_a_character() -> None:
    euro = "€".encode()
    emitted, detokenizer = run([b"x" + euro[:1], euro[1:2], euro[2:] + b"y"], ["€"])
    assert emitted == ["x", "", ""]
    assert detokenizer.stop is not None
    assert detokenizer.finish() == ""


def test_half_a_character_at_the_end() -> None:
    assert run([b"a\xe2\x82"], [])[0] == ["a", "\ufffd"]
    assert run([b"a\xe2\x82"], ["ab"])[0] == ["", "a\ufffd"]


def test_stop_string_completed_by_the_end() -> None:
    emitted, detokenizer = run([b"a\xe2"], ["\ufffd"])
    assert emitted == ["a", ""]
    assert detokenizer.stop is not None


def test_tokens_without_bytes_do_not_delay_text() -> None:
    assert run([b"\xc3", b"", b"\xa9"], [])[0] == ["", "", "é", ""]
