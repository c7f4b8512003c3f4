"""Turns in the page: streamed, stopped, coloured, forked, rewound, and as long as one likes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.ui.conftest import Server, Tab, eventually, serving, tab_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser

GREEDY = {"temperature": 0, "repetition_penalty": 1}
PROMPT = "def read(path):\n"


def continued(server: Server, prompt: str, num_tokens: int, **parameters: Any) -> str:
    """What the model makes of a prompt without the page."""
    body = {"prompt": prompt, "max_tokens": num_tokens} | GREEDY | parameters
    text: str = server.post("/v1/completions", **body)["choices"][0]["text"]
    return text


def test_a_text_streams_and_goes_on(tab: Tab, server: Server) -> None:
    tab.send(PROMPT, max_tokens=40, **GREEDY)
    first = tab.finished(0)
    assert tab.session_id().startswith("sess-")
    tab.send("")
    assert first + tab.finished(1) == continued(server, PROMPT, 80)
    assert "tokens 0 to" in tab.pane().locator(".turn-note").first.inner_text()
    assert "remembers all of them" in tab.pane().locator(".facts-line").inner_text()


def test_a_stopped_turn_is_what_the_session_holds(tab: Tab, server: Server) -> None:
    tab.send(PROMPT, max_tokens=50_000, **GREEDY)
    tab.pane().locator(".answer:not(:empty)").wait_for()
    eventually(lambda: len(tab.pane().locator(".answer").inner_text()) > 200)
    tab.button("Stop").click()
    text = tab.finished(0)
    assert "stopped" in tab.pane().locator(".turn-note").inner_text()
    session = server.get(f"/v1/sessions/{tab.session_id()}")
    num_prompt = server.post("/tokenize", prompt=PROMPT)["count"]
    num = session["position"] - num_prompt
    assert 0 < num < 50_000
    assert text == continued(server, PROMPT, num)


def test_forks_stand_side_by_side_and_below_their_parent(tab: Tab, server: Server) -> None:
    tab.send("class Tree", max_tokens=30, **GREEDY)
    tab.finished(0)
    tab.button("Fork").click()
    tab.pane("b").locator(".turn").wait_for()
    parent, fork = tab.session_id(), tab.session_id("b")
    metadata = server.get(f"/v1/sessions/{fork}")["metadata"]
    assert metadata["parent"] == parent
    nested = tab.page.locator(f".tree ul ul button[title='{fork}']")
    nested.wait_for()
    tab.pane("b").get_by_label("to both").check()
    tab.send("", "b", max_tokens=30)
    assert tab.finished(1) == tab.finished(1, "b")
    tab.send("x = ", "a")  # this pane's own box is not ticked
    tab.finished(2)
    assert tab.pane("b").locator(".turn").count() == 2
    tab.button("Close the conversation B", "b").click()
    eventually(lambda: tab.page.locator(".pane").count(), equals=1)


def test_a_rewind_undoes_turns_and_a_branch_keeps_them(tab: Tab, server: Server) -> None:
    for number, text in enumerate(("one = ", "two = ", "three = ")):
        tab.send(text, max_tokens=8, **GREEDY)
        tab.finished(number)
    at_end = server.get(f"/v1/sessions/{tab.session_id()}")["position"]
    turns = tab.pane().locator(".turn")
    turns.nth(0).get_by_role("button", name="Branch here").click()
    tab.pane("b").locator(".turn").wait_for()
    assert tab.pane("b").locator(".turn").count() == 1
    branch = server.get(f"/v1/sessions/{tab.session_id('b')}")
    assert branch["metadata"]["forked_at"] == str(branch["position"])
    assert server.get(f"/v1/sessions/{tab.session_id()}")["position"] == at_end

    turns.nth(1).get_by_role("button", name="Rewind to before this").click()
    eventually(turns.count, equals=1)
    assert tab.pane().locator("textarea").input_value() == "two = "
    assert server.get(f"/v1/sessions/{tab.session_id()}")["position"] == branch["position"]


def test_the_place_where_memory_begins_is_marked(tab: Tab, server: Server) -> None:
    tab.send(PROMPT, max_tokens=1500, **GREEDY)
    text = tab.finished(0)
    tab.pane().locator(".answer .horizon").wait_for()
    session = server.get(f"/v1/sessions/{tab.session_id()}")
    start = session["context_start"]
    assert start > 0
    assert f"token {start:,}" in tab.pane().locator(".horizon:visible").inner_text()
    assert f"from token {start:,}" in tab.pane().locator(".facts-line").inner_text()
    forgotten = "".join(tab.pane().locator(".answer .block.forgotten").all_text_contents())
    num_prompt = server.post("/tokenize", prompt=PROMPT)["count"]
    exact = len(continued(server, PROMPT, start - num_prompt))
    assert text.startswith(forgotten)
    assert abs(len(forgotten) - exact) < 60, "within the eight tokens between two marks"


def test_tokens_have_colours_alternatives_and_keys(tab: Tab) -> None:
    tab.send(PROMPT, max_tokens=12, probabilities=True, **GREEDY)
    tab.finished(0)
    spans = tab.pane().locator(".answer span")
    assert spans.count() == 12
    spans.nth(3).hover()
    tip = tab.page.locator("#token-tip")
    assert tip.locator("li").count() >= 5
    tab.pane().locator(".answer").focus()
    tab.page.keyboard.press("ArrowRight")
    assert "Likeliest" in tab.page.locator("#announce").inner_text()
    tab.page.keyboard.press("Escape")
    tip.wait_for(state="hidden")


def test_a_chat_by_template(tab: Tab) -> None:
    tab.pane().locator("select").select_option("chat")
    tab.send("Write a loop.", max_tokens=10, **GREEDY)
    tab.finished(0)
    assert tab.pane().locator(".turn.chat .prompt").inner_text() == "Write a loop."


def test_without_a_template_the_page_says_so(browser: "Browser") -> None:
    with serving() as served, tab_of(browser, served.url) as tab:
        tab.open()
        assert "no chat template" in tab.pane().inner_text()
        assert tab.pane().locator("option[value=chat]").is_disabled()


def test_what_the_model_writes_is_text(tab: Tab) -> None:
    """A prompt stands for the model's text as well: both enter the page in the same way."""
    markup = "<img src=x onerror=alert(1)><script>alert(2)</script><b>bold</b>"
    tab.send(markup, max_tokens=4, **GREEDY)
    tab.finished(0)
    assert tab.pane().locator(".prompt").inner_text() == markup
    assert tab.page.locator("#panes img, #panes script, .tree b, .prompt b").count() == 0


def test_a_snapshot_goes_down_and_comes_back_when_that_is_confirmed(
    tab: Tab, server: Server, tmp_path: Path
) -> None:
    tab.send("import os", max_tokens=8, **GREEDY)
    tab.finished(0)
    old = tab.session_id()
    with tab.page.expect_download() as download:
        tab.button("Download").click()
    path = tmp_path / "one.session"
    download.value.save_as(path)
    before = len(server.get("/v1/sessions?limit=100")["data"])
    for answer, num in (("Cancel", 0), ("Upload", 1)):
        tab.page.locator("#import-file").set_input_files(path)
        dialog = tab.page.locator("#confirm-dialog")
        dialog.get_by_role("button", name=answer, exact=True).click()
        dialog.wait_for(state="hidden")
        eventually(lambda: len(server.get("/v1/sessions?limit=100")["data"]), equals=before + num)
    tab.page.locator(".notice.good").wait_for()
    new = tab.session_id()
    assert new != old
    positions = {server.get(f"/v1/sessions/{each}")["position"] for each in (old, new)}
    assert len(positions) == 1
    assert "import os" in tab.finished(0), "the server told what it keeps"


MEMORY_AND_TIME = (
    "#memory-chart path.line.softmax",
    "#memory-chart circle.dot.a",
    "#time-chart .a",
)


def test_memory_and_time_are_drawn_from_what_was_measured(tab: Tab, server: Server) -> None:
    tab.send(PROMPT, max_tokens=300, **GREEDY)
    tab.finished(0)
    for selector in MEMORY_AND_TIME:
        tab.page.locator(selector).first.wait_for(state="attached")
    capacity = server.get("/v1/capacity")
    session = server.get(f"/v1/sessions/{tab.session_id()}")
    told = tab.page.locator("#memory-text").inner_text()
    assert f"{session['bytes']:,} bytes at token {session['position']:,}" in told
    assert f"{capacity['softmax_bytes_per_token']:,} bytes more with each token" in told
    assert capacity["softmax_bytes_per_token"] == 2 * 6 * 256 * 4


def test_ten_thousand_tokens_are_shown_and_the_page_still_answers(tab: Tab) -> None:
    tab.send(PROMPT, max_tokens=10_000, probabilities=True)
    tab.pane().locator(".turn[aria-busy=false]").wait_for(timeout=200_000)
    assert "10,000 tokens" in tab.pane().locator(".turn-note").inner_text()
    assert tab.pane().locator(".answer span").count() > 9_000
    tab.send("", max_tokens=5)
    tab.finished(1)


FEED = """async ([from, to, isColoured]) => {
  const { TextView } = await import(new URL("ui/text.js", document.baseURI));
  const list = document.querySelector(".turns");
  list.view ??= new TextView("Answer");
  list.append(list.view.element);
  for (let i = from; i < to; i += 1) {
    list.view.append(i % 12 ? " token" : "\\n", isColoured ? [0, -1, []] : null);
    if (i % 5 === 0) {
      list.view.flush();
      list.parentElement.scrollTop = 1e9;
    }
  }
}"""


@pytest.mark.parametrize("is_coloured", [False, True])
def test_a_token_costs_no_more_after_ten_thousand(tab: Tab, is_coloured: bool) -> None:
    """Processor time of the page's thread for equal numbers of tokens and layouts, so that what
    else the machine does does not count.
    """
    client = tab.page.context.new_cdp_session(tab.page)
    client.send("Performance.enable", {"timeDomain": "threadTicks"})

    def seconds() -> float:
        metrics = client.send("Performance.getMetrics")["metrics"]
        return float({each["name"]: each["value"] for each in metrics}["TaskDuration"])

    costs = []
    for start in range(0, 10_000, 2_500):
        before = seconds()
        tab.page.evaluate(FEED, [start, start + 2_500, is_coloured])
        costs.append(seconds() - before)
    assert costs[-1] < 3 * costs[0], "seven times as much would be a cost that grows with the text"
