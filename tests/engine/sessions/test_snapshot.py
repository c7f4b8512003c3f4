"""A snapshot holds a state to the bit, and bytes that are none end as one kind of error."""

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from cottention.engine.errors import (
    ModelFolderError,
    NonFiniteStateError,
    SnapshotError,
    SnapshotMismatchError,
)
from cottention.engine.sessions.fingerprint import Fingerprint
from cottention.engine.sessions.snapshot import MAX_HEADER_BYTES, SnapshotCodec
from cottention.engine.state.context_window import context_schedules
from cottention.engine.state.session_state import MAX_PENDING, SessionState
from cottention.engine.state.spec import StateSpec, StateTensor
from cottention.engine.text.tokenizer import Tokenizer
from tests.engine.making import ATTENTIONS, SESSION_FAMILIES, attention_folder, small_spec

KINDS_AND_FAMILIES = [*ATTENTIONS, *SESSION_FAMILIES]
SPECS = {kind: small_spec(kind, 3, more_keys=1) for kind in KINDS_AND_FAMILIES}
SPEC = SPECS["cottention"]
PRINTS = Fingerprint("aa" * 32, "bb" * 32, "rotary_dim=4", "layers=1")
NUM_IDS = 100
WINDOW = 3
BODY_AT = 40
CODECS = {
    kind: SnapshotCodec(PRINTS, spec, NUM_IDS, context_schedules(WINDOW), WINDOW)
    for kind, spec in SPECS.items()
}
CODEC = CODECS["cottention"]
KINDS = st.sampled_from(KINDS_AND_FAMILIES)

Header = dict[str, Any]


def rows(spec: StateSpec) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for shape in spec.shapes.values())


FULL = SessionState(rows(SPEC), 7, (5, 99), (0, 5, 99), {99: 3, 5: 0, 0: 0}, b"\xe2\x82")
FULLS = {kind: replace(FULL, rows=rows(spec)) for kind, spec in SPECS.items()}
RAWS = {kind: CODECS[kind].encode(state) for kind, state in FULLS.items()}


def sealed(body: bytes) -> bytes:
    return b"COTTSESS" + hashlib.sha256(body).digest() + body


def with_header(raw: bytes, text: bytes) -> bytes:
    """The same data behind another header, and a checksum that agrees."""
    (size,) = struct.unpack_from("<Q", raw, BODY_AT)
    return sealed(struct.pack("<Q", len(text)) + text + raw[BODY_AT + 8 + size :])


def header_of(raw: bytes) -> Header:
    (size,) = struct.unpack_from("<Q", raw, BODY_AT)
    found: Header = json.loads(raw[BODY_AT + 8 : BODY_AT + 8 + size])
    return found


def spelled(header: Header) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def same(a: SessionState, b: SessionState) -> bool:
    return (
        len(a.rows) == len(b.rows)
        and all(map(torch.equal, a.rows, b.rows))
        and replace(a, rows=()).__repr__() == replace(b, rows=(), counts=dict(a.counts)).__repr__()
        and dict(a.counts) == dict(b.counts)
    )


@pytest.mark.every_session
@pytest.mark.parametrize(
    "state",
    [
        SessionState(),
        SessionState(pending=(1,), recent=(1,), counts={1: 0}),
        FULL,
        replace(FULL, position=2**62),
        replace(FULL, context_policy="exact"),
    ],
)
def test_there_and_back(state: SessionState, attention: str) -> None:
    codec = CODECS[attention]
    if state.rows:
        state = replace(state, rows=FULLS[attention].rows)
    raw = codec.encode(state)
    assert same(codec.decode(raw), state)
    assert codec.encode(codec.decode(raw)) == raw


def test_equal_states_have_equal_bytes() -> None:
    turned = replace(FULL, counts={5: 0, 0: 0, 99: 3}, rows=tuple(row.clone() for row in FULL.rows))
    assert CODEC.encode(turned) == CODEC.encode(FULL)


def test_rows_that_are_a_view_of_a_pool() -> None:
    pool = torch.randn(3, *SPEC.shapes["state"]).transpose(0, 1)
    state = replace(FULL, rows=(pool.transpose(0, 1)[1],))
    assert torch.equal(CODEC.decode(CODEC.encode(state)).rows[0], state.rows[0])


def test_restored_rows_can_be_written() -> None:
    raw = CODEC.encode(FULL)
    CODEC.decode(raw).rows[0].zero_()
    assert CODEC.encode(CODEC.decode(raw)) == raw


def test_inside_is_a_safetensors_file() -> None:
    tensors = safetensors.torch.load(CODEC.encode(FULL)[BODY_AT:])
    assert torch.equal(tensors["row.state"], FULL.rows[0])
    assert tensors["pending"].tolist() == [5, 99]
    assert tensors["undecoded"].dtype == torch.uint8


def test_a_mismatch_names_all_that_differs() -> None:
    prints = Fingerprint("cc", "dd", "rotary_dim=8", "layers=2")
    other = SnapshotCodec(prints, SPEC, NUM_IDS, context_schedules(WINDOW), WINDOW)
    with pytest.raises(SnapshotMismatchError) as caught:
        other.decode(CODEC.encode(FULL))
    words = ("weights", "tokenizer", "config", "layout", "layers=1", "layers=2", "cc", "aa" * 32)
    for word in (*words, "rotary_dim=4", "rotary_dim=8"):
        assert word in str(caught.value)
    assert "format" not in str(caught.value)


def test_a_mismatch_of_dtype_alone_says_which_to_start_with() -> None:
    layout = "state=1x2x3x4:float32 weights="
    raws = {}
    for dtype in ("int8", "float32", "floatier"):
        prints = replace(PRINTS, layout=layout + dtype)
        codec = SnapshotCodec(prints, SPEC, NUM_IDS, context_schedules(WINDOW), WINDOW)
        raws[dtype] = codec.encode(FULL)
    here = SnapshotCodec(
        replace(PRINTS, layout=f"{layout}int8"), SPEC, NUM_IDS, context_schedules(WINDOW), WINDOW
    )
    with pytest.raises(SnapshotMismatchError, match="start it with --dtype float32") as caught:
        here.decode(raws["float32"])
    assert "differs" not in str(caught.value)
    with pytest.raises(SnapshotMismatchError, match=r"differs in layout .*weights=floatier"):
        here.decode(raws["floatier"])


@pytest.mark.parametrize("number", ["1", "2", "4"])
def test_another_format_is_refused_by_name(number: str) -> None:
    """Whatever else its header has: other formats have other fields, as those before had."""
    raw = CODEC.encode(FULL)
    text = spelled({"__metadata__": {"format": number}, "row.0": {}})
    with pytest.raises(SnapshotMismatchError) as caught:
        CODEC.decode(with_header(raw, text))
    message = str(caught.value)
    assert f"the snapshot has format '{number}'; this server reads format '3' only" in message
    assert "open a new session and send its text again" in message


def test_an_unknown_context_policy_is_a_mismatch() -> None:
    raw = CODEC.encode(FULL)
    header = header_of(raw)
    header["__metadata__"]["context_policy"] = "renew"
    with pytest.raises(SnapshotMismatchError, match="context_policy"):
        CODEC.decode(with_header(raw, spelled(header)))


def test_rows_on_another_grid_are_a_mismatch() -> None:
    other = SnapshotCodec(PRINTS, SPEC, NUM_IDS, context_schedules(2 * WINDOW + 2), WINDOW)
    with pytest.raises(SnapshotMismatchError, match=r"context_policy .*'renew 2/8'.*'renew 1/3'"):
        other.decode(CODEC.encode(FULL))
    exact = replace(FULL, context_policy="exact")
    assert same(other.decode(CODEC.encode(exact)), exact)


@pytest.mark.parametrize("recent", [(), (5, 99), (0, 0, 5, 99)])
def test_recent_ids_are_those_of_a_window(recent: tuple[int, ...]) -> None:
    with pytest.raises(SnapshotError, match="recent"):
        CODEC.decode(CODEC.encode(replace(FULL, recent=recent)))


@pytest.mark.every_session
def test_cut_anywhere(attention: str) -> None:
    codec, raw = CODECS[attention], RAWS[attention]
    for size in range(len(raw)):
        with pytest.raises(SnapshotError):
            codec.decode(raw[:size])
        if size >= BODY_AT:
            with pytest.raises(SnapshotError):
                codec.decode(sealed(raw[BODY_AT:size]))
    with pytest.raises(SnapshotError):
        codec.decode(raw + b"\0")
    with pytest.raises(SnapshotError):
        codec.decode(sealed(raw[BODY_AT:] + b"\0"))


@given(kind=KINDS, at=st.integers(0), flip=st.integers(1, 255))
def test_a_flipped_byte(kind: str, at: int, flip: int) -> None:
    raw = bytearray(RAWS[kind])
    raw[at % len(raw)] ^= flip
    with pytest.raises(SnapshotError):
        CODECS[kind].decode(bytes(raw))


@given(kind=KINDS, at=st.integers(0), flip=st.integers(1, 255))
def test_a_flipped_byte_under_a_checksum_that_agrees(kind: str, at: int, flip: int) -> None:
    """It is refused, or it is another state that is spelled as it was."""
    body = bytearray(RAWS[kind][BODY_AT:])
    body[at % len(body)] ^= flip
    raw = sealed(bytes(body))
    try:
        state = CODECS[kind].decode(raw)
    except SnapshotError:
        return
    assert CODECS[kind].encode(state) == raw


@given(kind=KINDS, body=st.binary(max_size=200))
def test_any_bytes(kind: str, body: bytes) -> None:
    for raw in (body, sealed(body), with_header(RAWS[kind], body)):
        with pytest.raises(SnapshotError):
            CODECS[kind].decode(raw)


def put(*path: str | int) -> Callable[[Header, Any], None]:
    def change(header: Header, value: Any) -> None:
        inner: Any = header
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


LIES = [
    *(
        (put("row.state", "shape"), x)
        for x in ([1], [1, 2, 4, 3], [-1, -2, 3, 4], [2**62] * 4, 7, None)
    ),
    *(
        (put(name, "shape"), [n])
        for name in ("pending", "counts", "undecoded")
        for n in (-1, 0, 4, 2**62, 1e300, 9 * 10**4299)
    ),
    *((put("pending", "shape"), x) for x in ([], [2, 1], [2.0], ["2"], [True], {}, [None])),
    *((put(name, "dtype"), x) for name in ("row.state", "pending") for x in ("F64", "I64", 4)),
    *((put("recent", "data_offsets"), x) for x in ([0, 12], [0, 2**63], [-1, 1], [])),
    *(
        (put("__metadata__", "position"), x)
        for x in ("-1", "1e3", str(2**62 + 1), "٣", "07", 7, "")
    ),
    (put("__metadata__", "more"), "x"),
    (put("__metadata__", "turn"), "0123456789abcdef"),
    (put("__metadata__"), []),
    (put("__metadata__"), None),
    (put("row.1"), {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
    (put("row.2"), {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}),
    (put("more"), {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    (put("events"), {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    (put("counts"), []),
]


@pytest.mark.every_session
@pytest.mark.parametrize(("change", "value"), LIES)
def test_a_header_that_lies(
    attention: str, change: Callable[[Header, Any], None], value: Any
) -> None:
    raw = RAWS[attention]
    header = header_of(raw)
    change(header, value)
    with pytest.raises(SnapshotError):
        CODECS[attention].decode(with_header(raw, spelled(header)))


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, raw in RAWS.items() for name in header_of(raw)]
)
def test_a_tensor_that_is_missing(kind: str, name: str) -> None:
    header = header_of(RAWS[kind])
    del header[name]
    with pytest.raises(SnapshotError):
        CODECS[kind].decode(with_header(RAWS[kind], spelled(header)))


def test_another_kind_has_other_rows() -> None:
    """Where the fingerprints agree, as they never do, the shapes still tell."""
    for here, codec in CODECS.items():
        for there in (kind for kind in SPECS if SPECS[kind].shapes != SPECS[here].shapes):
            with pytest.raises(SnapshotError):
                codec.decode(RAWS[there])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"null",
        b"[" * 16_000,
        b'{"a":' * 3_000,
        b"9" * 16_000,
        b'{"__metadata__":{"format":"\\ud800"}}',
        b"\xff\xfe",
        b" " * 20_000,
        spelled(header_of(CODEC.encode(FULL))).replace(b'{"dtype', b'{"dtype":"F32","dtype', 1),
        spelled(header_of(CODEC.encode(FULL))) + b" " * 8,
        spelled(header_of(CODEC.encode(FULL))).replace(b":", b": "),
    ],
)
def test_a_hostile_text(text: bytes) -> None:
    with pytest.raises(SnapshotError):
        CODEC.decode(with_header(CODEC.encode(FULL), text))


def test_a_length_beyond_the_file() -> None:
    with pytest.raises(SnapshotError):
        CODEC.decode(sealed(struct.pack("<Q", 2**64 - 1) + b"{}"))


NAN, INF = float("nan"), float("inf")
WIDER = StateSpec((*SPEC.tensors, StateTensor("conv", (1, 3, 5))))
"""Of a family that remembers more than the recurrence."""


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["state", "conv"])
def test_a_state_that_is_not_finite_is_neither_written_nor_read(name: str, wrong: float) -> None:
    codec = SnapshotCodec(PRINTS, WIDER, NUM_IDS, context_schedules(WINDOW), WINDOW)
    rows = {each.name: torch.full(each.shape, 0.125) for each in WIDER.tensors}
    state = replace(FULL, rows=tuple(rows.values()))
    raw = codec.encode(state)
    before = struct.pack("<f", 0.125)
    at = raw.index(before) if name == "state" else raw.rindex(before)
    with pytest.raises(SnapshotError, match="not finite"):
        codec.decode(sealed(raw[BODY_AT:at] + struct.pack("<f", wrong) + raw[at + 4 :]))
    rows[name].view(-1)[-1] = wrong
    with pytest.raises(NonFiniteStateError):
        codec.encode(state)


@pytest.mark.parametrize(
    "state",
    [
        replace(FULL, pending=(NUM_IDS,)),
        replace(FULL, pending=(-1,)),
        replace(FULL, recent=(2**31 - 1,)),
        replace(FULL, counts={NUM_IDS: 1}),
        replace(FULL, counts={1: -1}),
        replace(FULL, undecoded=b"\xe2\x82\xac"),
        replace(FULL, undecoded=b"abcd"),
        replace(FULL, undecoded=b"\x80"),
        replace(FULL, pending=()),
        replace(FULL, pending=(99, 5)),
        replace(FULL, recent=(0, 5, 5)),
        replace(FULL, recent=(1, 5, 99)),
        replace(FULL, counts={**FULL.counts} | {99: 10}),
        replace(FULL, counts={**FULL.counts} | dict.fromkeys(range(10, 20), 0)),
        replace(FULL, position=0, recent=(5, 99)),
        replace(SessionState(), undecoded=b"\xe2"),
    ],
)
def test_values_that_no_session_has(state: SessionState) -> None:
    with pytest.raises(SnapshotError):
        CODEC.decode(CODEC.encode(state))


def test_a_list_that_is_too_long_is_refused_by_its_header() -> None:
    """The list itself is never unpacked, or it would take ten times the bytes of the snapshot."""
    longest = (5,) * MAX_PENDING
    state = SessionState(pending=longest, recent=(5,) * WINDOW, counts={5: 0})
    raw = CODEC.encode(state)
    assert CODEC.decode(raw).pending == longest
    assert len(raw) <= CODEC.max_nbytes
    with pytest.raises(SnapshotError, match=rf"pending has {MAX_PENDING + 1} .* at most"):
        CODEC.decode(CODEC.encode(replace(state, pending=(*longest, 5))))


def test_the_largest_snapshot() -> None:
    ids = range(NUM_IDS)
    counts = dict.fromkeys(ids, 0)
    pending = (*ids, *[5] * (MAX_PENDING - NUM_IDS))
    largest = SessionState(FULL.rows, 7, pending, pending[-WINDOW:], counts, b"\xe2\x82")
    assert CODEC.max_nbytes - MAX_HEADER_BYTES < len(CODEC.encode(largest)) <= CODEC.max_nbytes


def test_counts_out_of_order() -> None:
    raw = CODEC.encode(replace(FULL, counts={1: 1, 2: 1}))
    ids = struct.pack("<2i", 1, 2)
    for wrong in ((2, 1), (1, 1)):
        body = raw[BODY_AT:].replace(ids, struct.pack("<2i", *wrong))
        with pytest.raises(SnapshotError, match="order"):
            CODEC.decode(sealed(body))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def fingerprint(folder: Path, dtype: str = "float32") -> Fingerprint:
    return Fingerprint.of(folder, Tokenizer.from_folder(folder).files, SPEC, dtype)


def test_fingerprints_follow_cosformers_fixed_length(tmp_path: Path) -> None:
    """It is in no weight, and a state means nothing under another."""
    changed = tmp_path / "changed"
    shutil.copytree(attention_folder("cosformer"), changed)
    first = fingerprint(changed)
    change_config(changed, cosformer_max_length=64)
    second = fingerprint(changed)
    assert replace(second, config="") == replace(first, config="")
    assert "cosformer_max_length=64" in second.config != first.config


def test_fingerprints_follow_the_files(folder: Path) -> None:
    first = fingerprint(folder)
    assert first == fingerprint(folder)
    assert "state=1x2x3x4:float32 weights=float32" in first.layout
    assert fingerprint(folder, "bfloat16").layout != first.layout
    assert "rotary_dim=" in first.config
    change_config(folder, layer_norm_epsilon=1e-6, eos_token_id=7)
    assert "layer_norm_epsilon=1e-06" in fingerprint(folder).config
    change_config(folder, layer_norm_epsilon=1e-5)
    assert fingerprint(folder) == first, "where a text ends is no arithmetic"
    weights = next(path for path in folder.iterdir() if path.suffix in {".safetensors", ".bin"})
    weights.write_bytes(weights.read_bytes() + b"x")
    second = fingerprint(folder)
    assert second.weights != first.weights
    assert second.tokenizer == first.tokenizer
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    assert fingerprint(folder).tokenizer != first.tokenizer
    weights.unlink()
    with pytest.raises(ModelFolderError):
        fingerprint(folder)


def test_an_id_that_was_generated_more_often_than_a_count_tells() -> None:
    long = replace(FULL, position=2**31, counts={**FULL.counts} | {99: 2**31 - 2})
    state = CODEC.decode(CODEC.encode(long))
    state = state.extended([], [99, 99, 99], WINDOW)
    assert state.counts == {**FULL.counts} | {99: 2**31 - 1}
    assert CODEC.decode(CODEC.encode(state)).counts == state.counts
