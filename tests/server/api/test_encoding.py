"""/v1/embeddings and /v1/fill-mask by a real encoder, and what each kind of model refuses."""

import base64
import json
import struct
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cottention.engine.config import EngineConfig
from cottention.engine.encoder_engine import EncoderEngine
from cottention.engine.encoding import EncodeParams
from cottention.engine.engine import Engine
from cottention.server.generation.chat_template import ChatTemplate
from cottention.server.generation.template_environment import compile_template
from cottention.server.log_config import FIELDS
from tests.engine.encoders import encoder_folder
from tests.server.live import Live, eventually, serving

TEXTS = ["the cat sat", "a dog", "the bigger mat!"]
MASKED = "the [MASK] sat on the [MASK]"
TEMPLATE = ChatTemplate(compile_template("{{ messages[-1]['content'] }}"), (), {})


def encoder(**settings: Any) -> EncoderEngine:
    return EncoderEngine(encoder_folder(), EngineConfig(**{"max_slots": 8} | settings))


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving(encoder(max_batch_tokens=32), max_body_bytes=200_000) as live:
        yield live


def embed(live: Live, **body: Any) -> Any:
    response = live.client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def vector(raw: bytes) -> list[float]:
    return list(struct.unpack(f"<{len(raw) // 4}f", raw))


def test_embeddings_have_openais_form(live: Live) -> None:
    engine = encoder()
    expected = [vector(each.embedding) for each in engine.encode(TEXTS)]
    ids = [engine.tokenizer.framed(engine.tokenizer.encode(text)) for text in TEXTS]
    for given in (TEXTS, ids):
        answer = embed(live, input=given, model=live.engine.name, user="me")
        assert answer["object"] == "list"
        assert answer["model"] == live.engine.name
        assert answer["data"] == [
            {"object": "embedding", "index": index, "embedding": each}
            for index, each in enumerate(expected)
        ]
        num_tokens = sum(map(len, ids))
        assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    for one in (TEXTS[0], ids[0]):
        [data] = embed(live, input=one, encoding_format="base64")["data"]
        assert vector(base64.b64decode(data["embedding"])) == expected[0]
    bare = embed(live, input=TEXTS[0], add_special_tokens=False)
    assert bare["usage"]["prompt_tokens"] == len(ids[0]) - 2


def test_masks_are_filled(live: Live) -> None:
    engine = encoder()
    ids = engine.tokenizer.framed(engine.tokenizer.encode(MASKED))
    [expected] = engine.encode([MASKED], EncodeParams(mask_id=4, top_k=2))
    body = {"input": [MASKED, "[MASK]"], "top_k": 2}
    answer = live.client.post("/v1/fill-mask", json=body).json()
    assert answer["usage"]["prompt_tokens"] == len(ids) + 3
    first, second = answer["data"]
    assert (first["object"], first["index"], second["index"]) == ("fill_mask", 0, 1)
    assert [mask["position"] for mask in first["masks"]] == [2, 6]
    for mask, found in zip(first["masks"], expected.masks, strict=True):
        assert [(each["token"], each["score"]) for each in mask["predictions"]] == list(
            found.tokens
        )
        tokens = [engine.tokenizer.id_to_token(each["token"]) for each in mask["predictions"]]
        assert [each["token_str"] for each in mask["predictions"]] == tokens
    body = {"input": "a [MASK]", "targets": ["Cat", "##ger", "dog", "cat"]}
    [data] = live.client.post("/v1/fill-mask", json=body).json()["data"]
    predictions = data["masks"][0]["predictions"]
    assert {each["token_str"] for each in predictions} == {"cat", "##ger", "dog"}
    scores = [each["score"] for each in predictions]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("embeddings", {}, "input", "input is required"),
        ("embeddings", {"input": ""}, "input", "input must not be empty"),
        ("embeddings", {"input": []}, "input", "input must not be empty"),
        ("embeddings", {"input": ["a", 5]}, "input", "at index 1 is 5"),
        ("embeddings", {"input": "\ud800"}, "input", "lone surrogate"),
        ("embeddings", {"input": ["a", "b " * 63]}, "input", "index 1 must have at most 64 tokens"),
        ("embeddings", {"input": [[1], [300]]}, "input", "ids in input at index 1 must be"),
        ("embeddings", {"input": ["a"] * 2049}, "input", "input must have 1 to 2048 texts"),
        ("embeddings", {"input": "a", "dimensions": 8}, "dimensions", "as wide as the model"),
        ("embeddings", {"input": "a", "encoding_format": "hex"}, "encoding_format", '"base64"'),
        ("embeddings", {"input": "a", "timeout": -1}, "timeout", "greater than 0"),
        ("embeddings", {"input": "a", "priority": 2**64}, "priority", "64 bits"),
        ("embeddings", {"input": "a", "top_k": 3}, "top_k", "there is no field"),
        ("fill-mask", {"input": "a cat"}, "input", "must have the mask token [MASK] in it"),
        ("fill-mask", {"input": ["[MASK]", "a"]}, "input", "input at index 1 must have the mask"),
        ("fill-mask", {"input": []}, "input", "input must have 1 to 2048 texts"),
        ("fill-mask", {"input": [4]}, "input", "at index 0 is 4"),
        ("fill-mask", {"input": "[MASK]", "top_k": 0}, "top_k", "from 1 to 100; it is 0"),
        ("fill-mask", {"input": "[MASK]", "targets": []}, "targets", "1 to 100 tokens"),
        ("fill-mask", {"input": "[MASK]", "targets": ["cats"]}, "targets", '"cats" is not'),
        ("fill-mask", {"input": "[MASK]", "targets": "cat"}, "targets", "a list of 1 to 100"),
    ],
)
def test_bad_input_is_a_400_that_names_the_field(
    live: Live, path: str, body: dict[str, Any], param: str, message: str
) -> None:
    response = live.client.post(f"/v1/{path}", content=json.dumps(body))
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]


def test_sixty_four_clients_at_once_get_what_each_gets_alone(live: Live) -> None:
    texts = [" ".join(TEXTS[(i + j) % 3] for j in range(1 + i % 9)) for i in range(64)]
    expected = [vector(each.embedding) for each in encoder().encode(texts)]
    with ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda text: embed(live, input=text), texts))
    assert [answer["data"][0]["embedding"] for answer in answers] == expected
    eventually(lambda: live.engine.stats().num_free_slots, equals=8)


def test_health_is_quick_while_the_engine_computes() -> None:
    engine = encoder(max_batch_tokens=8)
    may_go, began = threading.Event(), threading.Event()
    step = engine.step

    def held() -> Any:
        began.set()
        may_go.wait(60)
        return step()

    engine.step = held  # type: ignore[method-assign]
    with serving(engine) as live, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(embed, live, input="a " * 40)
        assert began.wait(60)
        assert live.client.get("/health").status_code == 200
        assert not waiting.done()
        may_go.set()
        assert waiting.result()["usage"]["prompt_tokens"] == 42


def test_an_encoder_says_what_it_can_do(live: Live) -> None:
    [model] = live.client.get("/v1/models").json()["data"]
    assert model["capabilities"] == ["embeddings", "fill-mask"]
    assert model["max_model_len"] == 64
    for method, path in (
        ("POST", "/v1/completions"),
        ("POST", "/v1/chat/completions"),
        ("POST", "/v1/sessions"),
        ("GET", "/v1/sessions/x"),
        ("GET", "/v1/capacity"),
    ):
        response = live.client.request(method, path)
        assert response.status_code == 400, path
        error = response.json()["error"]
        assert error["code"] == "unsupported_by_model"
        assert "it serves embeddings (POST /v1/embeddings), fill-mask" in error["message"]
    tokens = live.client.post("/tokenize", json={"prompt": "the bigger cat"}).json()["tokens"]
    assert tokens == [2, 5, 12, 13, 6, 3]
    text = live.client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
    assert text == "[CLS] the bigger cat [SEP]"
    metrics = live.client.get("/metrics").text
    assert "cottention:prompt_tokens_total" in metrics
    assert "num_sessions" not in metrics


def test_a_causal_model_says_what_it_can_do(shared: Live) -> None:
    [model] = shared.client.get("/v1/models").json()["data"]
    assert model["capabilities"] == ["completions", "sessions"]
    for path, hint in (("/v1/embeddings", "started with --embeddings"), ("/v1/fill-mask", "")):
        error = shared.client.post(path, json={"input": "a"}).json()["error"]
        assert error["param"] == "model"
        assert "it serves completions (POST /v1/completions), sessions" in error["message"]
        assert hint in error["message"]


def test_a_model_with_a_template_serves_chats(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=1))
    with serving(engine, TEMPLATE) as live:
        [model] = live.client.get("/v1/models").json()["data"]
    assert model["capabilities"] == ["completions", "chat", "sessions"]


def test_a_causal_model_embeds_where_a_flag_lets_it(gptj_folder: Path) -> None:
    engine = Engine(gptj_folder, EngineConfig(max_slots=2, embeddings=True))
    with serving(engine) as live:
        [model] = live.client.get("/v1/models").json()["data"]
        assert model["capabilities"] == ["completions", "sessions", "embeddings"]
        answer = embed(live, input=[[5, 6, 7], [8]])
        assert [len(each["embedding"]) for each in answer["data"]] == [64, 64]
        assert answer["usage"]["prompt_tokens"] == 4
        assert live.complete(prompt=[5, 6], max_tokens=2).status_code == 200
        error = live.client.post("/v1/fill-mask", json={"input": "a"}).json()["error"]
        assert "it serves completions" in error["message"]


def test_keys_limits_deadlines_and_the_log_hold(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="cottention.requests")
    settings = {"api_key": ("one",), "key_max_tokens_per_minute": 4}
    with serving(encoder(), **settings) as live:
        assert live.client.post("/v1/embeddings", json={"input": "a"}).status_code == 401
        live.client.headers["authorization"] = "Bearer one"
        answer = embed(live, input="a cat sat on", request_id="mine")
        assert answer["id"] == "embd-mine"
        assert live.client.post("/v1/embeddings", json={"input": "a"}).status_code == 429
    lines: list[Any] = [getattr(record, FIELDS) for record in caplog.records]
    [line] = [each for each in lines if each["status"] == 200]
    assert (line["prompt_tokens"], line["finish_reason"]) == (6, "stop")


def test_answers_count_as_items_of_a_response() -> None:
    """A vector of 64 numbers as 16, a prediction as one."""
    with serving(encoder(), max_response_items=32) as live:
        assert len(embed(live, input=["a", "b"])["data"]) == 2
        masks = {"input": [MASKED] * 2, "top_k": 8}
        answer = live.client.post("/v1/fill-mask", json=masks)
        assert len(answer.json()["data"]) == 2, "equal texts are answered each"
        for path, body in (
            ("embeddings", {"input": ["a"] * 3}),
            ("fill-mask", masks | {"top_k": 9}),
        ):
            response = live.client.post(f"/v1/{path}", json=body)
            assert response.status_code == 400
            assert "at most 32 (--max-response-items)" in response.json()["error"]["message"]


def test_a_deadline_ends_a_text_that_waits() -> None:
    engine = encoder()
    engine._scheduler.take_short = lambda _: []  # type: ignore[method-assign]
    with serving(engine) as live:
        response = live.client.post("/v1/embeddings", json={"input": "a", "timeout": 0.2})
        assert response.status_code == 504
        eventually(lambda: engine.stats().num_waiting, equals=0)
