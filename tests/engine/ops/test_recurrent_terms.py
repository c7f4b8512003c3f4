"""recurrent_step with w, a and b: against float64, and in equal bits however a sequence is cut."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch

from cottention.engine import ops
from cottention.engine.ops import reference
from tests.engine.step_cases import FORMS, Case, Terms, make, terms_of

WIDTHS = [(64, 64), (8, 8), (24, 40), (72, 16), (128, 64), (256, 512), (512, 24), (136, 264)]


def assert_parity(case: Case, terms: Terms) -> None:
    exact = case.to(torch.float64)
    expected = reference.recurrent_step(*exact, **terms.double())
    untouched = torch.ones(len(case.state), dtype=torch.bool)
    untouched[case.state_indices[case.state_indices >= 0].long()] = False
    before = case.state.clone()
    out = ops.recurrent_step(*case, **terms._asdict())
    assert ((out - expected).abs() <= 4e-6 * expected.abs().amax().clamp_min(1e-3)).all()
    torch.testing.assert_close(case.state.double(), exact.state, rtol=1e-6, atol=1e-5)
    assert torch.equal(case.state[untouched], before[untouched])
    if case.z is not None and exact.z is not None:
        torch.testing.assert_close(case.z.double(), exact.z, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("key", "value"), WIDTHS)
def test_widths(form: str, key: int, value: int) -> None:
    case = make([1, 2, 0, 3], [5, -1, 0, 3], key, value, pool_size=7)
    assert_parity(case, terms_of(form, case))


@pytest.mark.parametrize("form", FORMS)
def test_decode_on_permuted_slots_with_padding(form: str) -> None:
    case = make([1] * 9, [4, 11, 0, -1, 7, 3, 9, 1, -1], pool_size=12)._replace(cu_seqlens=None)
    assert_parity(case, terms_of(form, case))


@pytest.mark.parametrize("value", [264, 512])
def test_wide_values_without_terms(value: int) -> None:
    case = make([1, 2, 0, 3], [5, -1, 0, 3], 128, value, pool_size=7, denominator=True)
    assert_parity(case, Terms(None, None, None))


@pytest.mark.parametrize("form", ["w-head", "w-key"])
@pytest.mark.parametrize("key", [8, 64, 72])
def test_a_denominator_decays_as_the_state(form: str, key: int) -> None:
    case = make([1, 2, 0, 3], [5, -1, 0, 3], key, 16, denominator=True)
    assert_parity(case, terms_of(form, case))


def test_one_decay_for_all_tokens_and_one_key_for_all_heads() -> None:
    """Expanded tensors, whose strides are zero."""
    case = make([3, 1], [2, 0], 16, 24, heads=4)
    k, q = case.k[:, :1].expand_as(case.k), case.q[:, :1].expand_as(case.q)
    w = torch.tensor([0.9, 0.8, 0.7, 0.6]).expand(4, 4)
    assert_parity(case._replace(q=q, k=k), Terms(w, None, None))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("key", "value"), [(64, 64), (128, 64), (24, 40), (256, 512)])
@pytest.mark.usefixtures("one_thread")
def test_bits_depend_on_the_row_alone(form: str, key: int, value: int) -> None:
    """Tokens together on all threads, and one by one on one: equal outputs and states."""
    lengths, slots = [40, 1, 0, 6], [3, 0, 2, 1]
    together = make(lengths, slots, key, value, pool_size=5)
    terms = terms_of(form, together)
    alone = together.to(torch.float32)
    torch.set_num_threads(2)
    expected = ops.recurrent_step(*together, **terms._asdict())
    torch.set_num_threads(1)
    bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for slot, (start, stop) in zip(slots, pairwise(bounds), strict=True):
        rows = torch.tensor([slot], dtype=torch.int32)
        for t in range(start, stop):
            q, k, v = (x[t : t + 1] for x in alone[:3])
            now = terms.part(t, t + 1)
            out = ops.recurrent_step(q, k, v, alone.state, None, rows, **now)
            assert torch.equal(out, expected[t : t + 1])
    assert torch.equal(alone.state, together.state)


def test_absent_terms_and_those_that_change_nothing_have_equal_values() -> None:
    plain = make([3, 2], [1, 0])
    ones, key = plain.to(torch.float32), plain.k.shape
    out = ops.recurrent_step(*plain)
    zeros = torch.zeros(key)
    assert torch.equal(ops.recurrent_step(*ones, w=torch.ones(key), a=zeros, b=zeros), out)
    assert torch.equal(plain.state, ones.state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_with_float32_terms(form: str, dtype: torch.dtype) -> None:
    case = make([3, 1], [2, 0], 24, 40)
    terms = terms_of(form, case)._asdict()
    q, k, v = (x.to(dtype) for x in case[:3])
    short = case.to(torch.float32)._replace(q=q, k=k, v=v)
    wide = case.to(torch.float32)._replace(q=q.float(), k=k.float(), v=v.float())
    expected = ops.recurrent_step(*wide, **terms)
    assert torch.equal(ops.recurrent_step(*short, **terms), expected.to(dtype))
    assert torch.equal(short.state, wide.state)


WRONG = {
    "a and b must be given together": {"a": (5, 2)},
    "a and b are not supported with z": {"a": (5, 2), "b": (5, 2), "z": (12, 2)},
    r"\bw\b": {"w": (4, 2)},
    r"\bb\b": {"a": (5, 2), "b": (5, 1)},
}


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("message", WRONG)
def test_wrong_terms_are_refused_before_memory_is_touched(message: str, width: int) -> None:
    case = make([2, 3], [1, 0], width, width)
    before = case.state.clone()
    given = {name: torch.ones(*shape, width) for name, shape in WRONG[message].items()}
    case = case._replace(z=given.pop("z", None))
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.recurrent_step(*case, **given)
    assert torch.equal(case.state, before)


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("name", ["w", "a", "b"])
def test_terms_have_the_type_of_the_state(name: str, width: int) -> None:
    case = make([2, 3], [1, 0], width, width)
    case = case._replace(q=case.q.bfloat16(), k=case.k.bfloat16(), v=case.v.bfloat16())
    terms = {x: torch.ones(5, 2, width) for x in "wab"}
    terms[name] = terms[name].bfloat16()
    with pytest.raises((ValueError, RuntimeError), match=f"{name} has the wrong dtype"):
        ops.recurrent_step(*case, **terms)


def test_opcheck() -> None:
    case = make([2, 1], [3, -1], 16, 8)
    terms = terms_of("w-key ab", case)
    op, tests = torch.ops.cottention.recurrent_step.default, ("test_schema", "test_faketensor")
    torch.library.opcheck(op, (*case, *terms), test_utils=tests)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("slots", [[4, -1, 2], [-1, 3, -1], [-1, -1, -1]])
def test_the_reference_of_one_token_each_waits_for_no_value(form: str, slots: list[int]) -> None:
    """It equals the reference of segments, padding at any place included."""
    case = make([1, 1, 1], slots, 8, 12, pool_size=6).to(torch.float64)
    other, terms = case.to(torch.float64), terms_of(form, case).double()
    expected = reference.recurrent_step(*case, **terms)
    got = reference.recurrent_step(*other._replace(cu_seqlens=None), **terms)
    assert torch.equal(got, expected)
    assert torch.equal(other.state, case.state)


@pytest.mark.parametrize("form", ["plain", *FORMS])
def test_segments_that_are_cut_elsewhere_are_stepped_with_terms(form: str) -> None:
    """Only the plain form has a chunked one; the rows of cut segments are kept for the others."""
    case = make([3, 70, 1], [2, 0, -1], 16, 24, pool_size=4)
    exact, terms = case.to(torch.float64), terms_of(form, case)
    expected = reference.recurrent_step(*exact, **terms.double())
    segments = ops.Segments.of([2, 0, -1], [3, 70, 1], 4, "cpu", form="chunks")
    assert segments.chunks is not None
    out = ops.recurrent_segments(*case[:5], segments, **terms._asdict())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(case.state.double(), exact.state, rtol=1e-5, atol=1e-5)
