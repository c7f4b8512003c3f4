"""Sampled ids to `Output`s: text, stop strings, finish reasons and the session after its turn."""

from cottention.engine.outputs import FinishReason, Output, TokenLogprob
from cottention.engine.scheduling.request import Choice
from cottention.engine.state.session_state import SessionState


class OutputProcessor:
    """Makes the outputs of choices. It changes nothing of a request but its choices' text."""

    def __init__(self, window: int) -> None:
        """`window`: how many of its last ids a session state keeps."""
        self._window = window

    def process(self, choice: Choice, token_id: int, logprob: TokenLogprob | None = None) -> Output:
        """The output of an id that has just been appended to its choice.

        finish_reason is set where the id ends the choice; `state` then has a session's new ids,
        but none of them in its rows.
        """
        request, detokenizer = choice.request, choice.detokenizer
        params = request.params
        if choice.num_generated == params.min_tokens:
            detokenizer.watch(params.stop)
        is_stop_id = token_id in request.constraints.stop_token_ids
        is_written = not is_stop_id or params.include_stop_str_in_output
        text = detokenizer.push(token_id) if is_written else ""
        logprobs = () if logprob is None else (logprob,)
        is_full = choice.num_generated == params.max_tokens
        if not is_stop_id and not is_full and detokenizer.stop is None:
            return _output(choice, text, (token_id,), None, logprobs)
        text += _final_text(choice)  # it may complete a stop string
        is_stopped = is_stop_id or detokenizer.stop is not None
        reason = FinishReason.STOP if is_stopped else FinishReason.LENGTH
        output = _output(choice, text, (token_id,), reason, logprobs)
        output.stop_reason = _stop_reason(choice, token_id)
        output.state = self._session_state(choice)
        return output

    def replay(self, choice: Choice, token_ids: tuple[int, ...]) -> Output:
        """The output of ids that the choice's turn has generated before, which did not end it."""
        text = ""
        for token_id in token_ids:
            choice.append_token(token_id)
            if choice.num_generated == choice.request.params.min_tokens:
                choice.detokenizer.watch(choice.request.params.stop)
            text += choice.detokenizer.push(token_id)
        choice.pending = []  # the prefill has them
        return _output(choice, text, token_ids, None)

    def finish(self, choice: Choice, reason: FinishReason, error: str | None = None) -> Output:
        """The last output of a choice that ends without another id.

        Text that was held back is sent, except after an error. `state` as in `process`, where the
        reason is LENGTH: a turn that is cut leaves no state.
        """
        text = "" if reason is FinishReason.ERROR else _final_text(choice)
        output = _output(choice, text, (), reason)
        output.error = error
        output.state = self._session_state(choice) if reason is FinishReason.LENGTH else None
        return output

    def _session_state(self, choice: Choice) -> SessionState | None:
        """The session after the turn, with the turn's ids pending; None without a session."""
        start = choice.request.start
        if start is None:
            return None
        undecoded = choice.detokenizer.undecoded
        turn_ids = choice.request.turn_ids
        return start.extended(turn_ids, choice.generated_ids, self._window, undecoded)


def _output(
    choice: Choice,
    text: str,
    token_ids: tuple[int, ...],
    reason: FinishReason | None,
    logprobs: tuple[TokenLogprob, ...] = (),
) -> Output:
    """An output with the per-request fields, some of which are sent with choice 0 only.

    One for each token: its fields are given by place, as far as each output needs them.
    """
    request = choice.request
    output = Output(
        request.id,
        choice.index,
        text,
        token_ids,
        reason,
        None,
        None,
        logprobs,
        None,
        None,
        0,
        choice.context_start,
        request.started,
    )
    is_first = choice.index == 0 and choice.num_generated == len(token_ids)
    if is_first and request.params.prompt_logprobs is not None:
        output.prompt_logprobs = tuple(request.prompt_logprobs)
    if reason is not None:
        output.num_cached = request.num_cached if choice.index == 0 else 0
        output.encoded = request.encoded
    return output


def _final_text(choice: Choice) -> str:
    """Text that was held back, and the stop string where the request includes it."""
    is_session = choice.request.start is not None
    text = choice.detokenizer.pause() if is_session else choice.detokenizer.finish()
    if choice.request.params.include_stop_str_in_output:
        text += choice.detokenizer.stop or ""
    return text


def _stop_reason(choice: Choice, token_id: int) -> str | int | None:
    """The request's own stop string or stop id that ended the choice, if one did."""
    if choice.detokenizer.stop is not None:
        return choice.detokenizer.stop
    return token_id if token_id in choice.request.constraints.own_stop_token_ids else None
