"""What agents ask for: parsed answers and calls of functions, by the helpers of their frameworks.

Each answer is parsed by the client itself, which refuses what does not follow the schema.
"""

import json
from typing import Annotated, Any, Literal

import dspy
import instructor
import pytest
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from openai import OpenAI, pydantic_function_tool
from pydantic import BaseModel, Field, SecretStr
from pydantic_ai import Agent, ModelSettings, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from tests.clients.conftest import Served

SAID = "How warm is it?"
MESSAGES: Any = [{"role": "user", "content": SAID}]
LIMITS: Any = {"max_tokens": 400, "seed": 7}

Level = Annotated[int, Field(ge=0, le=99)]
Short = Annotated[str, Field(max_length=4)]


class Weather(BaseModel):
    """The weather in a city."""

    city: Literal["Rome", "Oslo"]
    level: Level
    notes: Annotated[list[Short], Field(max_length=2)]


@pytest.fixture
def client(served: Served) -> OpenAI:
    return OpenAI(base_url=served.base_url, api_key=served.key, max_retries=0)


def test_openai_parses_answers(client: OpenAI, served: Served) -> None:
    parsed = client.chat.completions.parse(
        model=served.model, messages=MESSAGES, response_format=Weather, **LIMITS
    )
    expected = parsed.choices[0].message.parsed
    assert isinstance(expected, Weather)
    with client.chat.completions.stream(
        model=served.model, messages=MESSAGES, response_format=Weather, **LIMITS
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"content.delta", "content.done"} <= kinds
    assert final.choices[0].message.parsed == expected


def test_openai_parses_calls(client: OpenAI, served: Served) -> None:
    asked: Any = {
        "model": served.model,
        "messages": MESSAGES,
        "tools": [pydantic_function_tool(Weather)],
        "tool_choice": "required",
        **LIMITS,
    }
    message = client.chat.completions.parse(**asked).choices[0].message
    assert message.tool_calls
    (first, *_) = message.tool_calls
    assert isinstance(first.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in kinds
    assert streamed
    assert [each.function for each in streamed] == [each.function for each in message.tool_calls]

    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "20"} for call in message.tool_calls
    ]
    again: Any = [*MESSAGES, message.model_dump(exclude_none=True), *results]
    done = client.chat.completions.create(
        **asked | {"messages": again, "tool_choice": "none", "max_tokens": 8}
    )
    assert done.choices[0].message.content
    assert done.choices[0].finish_reason == "length"


def test_langchain(served: Served) -> None:
    @tool  # type: ignore[untyped-decorator,unused-ignore]
    def weather(city: Literal["Rome", "Oslo"], level: Level) -> str:
        """The weather in a city."""
        return f"{city} {level}"

    key = SecretStr(served.key)
    model = ChatOpenAI(base_url=served.base_url, api_key=key, model=served.model, **LIMITS)
    for method in ("json_schema", "function_calling"):
        assert isinstance(
            model.with_structured_output(Weather, method=method).invoke(SAID), Weather
        )
    bound = model.bind_tools([weather], tool_choice="any")
    answer = bound.invoke(SAID)
    assert answer.tool_calls
    for call in answer.tool_calls:
        assert weather.invoke(call["args"])
    parts = list(bound.stream(SAID))
    whole = parts[0]
    for part in parts[1:]:
        whole += part
    assert [call["args"] for call in whole.tool_calls] == [
        call["args"] for call in answer.tool_calls
    ]


async def test_pydantic_ai(served: Served) -> None:
    provider = OpenAIProvider(base_url=served.base_url, api_key=served.key)
    model = OpenAIChatModel(served.model, provider=provider)
    settings = ModelSettings(max_tokens=400, seed=7)
    for output in (Weather, NativeOutput(Weather)):
        agent: Any = Agent(model, output_type=output, model_settings=settings)
        assert isinstance((await agent.run(SAID)).output, Weather)


@pytest.mark.parametrize("mode", [instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA])
def test_instructor(client: OpenAI, served: Served, mode: instructor.Mode) -> None:
    patched = instructor.from_openai(client, mode=mode)
    answer = patched.chat.completions.create(
        model=served.model, messages=MESSAGES, response_model=Weather, max_retries=0, **LIMITS
    )
    assert isinstance(answer, Weather)


def test_dspy(served: Served) -> None:
    class Local(dspy.LM):
        """Of a model that the client's catalogue does not know: it is told what that can do."""

        supports_response_schema = True
        supported_params = frozenset({"response_format"})

    class Ask(dspy.Signature):
        """Answer a question."""

        question: str = dspy.InputField()
        city: Literal["Rome", "Oslo"] = dspy.OutputField()
        warm: bool = dspy.OutputField()

    name = f"openai/{served.model}"
    model = Local(name, api_base=served.base_url, api_key=served.key, cache=False, **LIMITS)
    with dspy.context(lm=model, adapter=dspy.JSONAdapter()):
        answer = dspy.Predict(Ask)(question=SAID)
    assert answer.city in ("Rome", "Oslo")
    assert isinstance(answer.warm, bool)
    assert json.dumps(answer.toDict())
