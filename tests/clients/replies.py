"""What the scripted model answers: by what was said last, and by what the answer may be. A test double's script."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TURN = re.compile(r"<\|(system|user|assistant)\|>(.*?)(?:<\|end\|>|$)", re.DOTALL)
TOOL_RESPONSE = re.compile(r"<tool_response>\n(.*?)\n</tool_response>", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the demo's chat template writes it, taken apart again; a plain one is all `last`."""

    system: str
    users: tuple[str, ...]
    last: str

    @classmethod
    def of(cls, text: str) -> Prompt:
        turns = TURN.findall(text)
        system = "\n".join(said for role, said in turns if role == "system")
        users = tuple(said for role, said in turns if role == "user")
        return cls(system, users, users[-1] if users else text)

    @property
    def has_tools(self) -> bool:
        """Whether the model was told of tools."""
        return "<tools>" in self.system


@dataclass(frozen=True)
class Line:
    """`pattern` is looked for in what was said last; the first of `replies` that the request allows is given."""

    pattern: str
    replies: tuple[str | Callable[[Prompt], str], ...]


def call(name: str, arguments: Mapping[str, Any]) -> str:
    """A tool call as the demo, whose template knows of no tools, is told to write it."""
    body = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _tool_results(prompt: Prompt) -> str:
    return "The tools say: " + "; ".join(TOOL_RESPONSE.findall(prompt.last))


JOKE = {"setup": "Why do cats type badly?", "punchline": "They paw at the keys."}
ADA = {"name": "Ada", "age": 36}
PARIS, OSLO = {"city": "Paris"}, {"city": "Oslo"}
NO_TOOL = "I cannot know the weather."
GREETING = "Hello there, friend. I hope that you are well."

SCRIPT = (
    Line(r"<tool_response>", (_tool_results,)),
    # langchain-tests
    Line(r"magic_function_no_args\(\)", (call("magic_function_no_args", {}),)),
    Line(r"magic_function\(3\)|^Hello!$", (call("magic_function", {"input": 3}), GREETING)),
    Line(r"Pirate greeting", (call("greeting_generator", {"answer_style": "pirate"}),)),
    Line(r"What is 3 \+ 4", (call("my_adder_tool", {"a": 3, "b": 4}),)),
    Line(r"San Francisco", (call("get_weather", {"location": "San Francisco, CA"}),)),
    Line(r"joke about cats", (json.dumps(JOKE), call("Joke", JOKE), call("JokeDict", JOKE))),
    Line(r"你好啊集团", (call("unicode_customer", {"customer_name": "你好啊集团", "description": "技术公司 🙂"}),)),
    Line(r"こんにちは株式会社", (call("unicode_customer", {"customer_name": "こんにちは株式会社", "description": "会社"}),)),
    # this suite's own
    Line(
        r"weather in Paris and Oslo",
        (call("get_weather", PARIS) + "\n" + call("get_weather", OSLO), call("get_weather", PARIS), NO_TOOL),
    ),
    Line(r"weather in Paris", (call("get_weather", PARIS), NO_TOOL)),
    Line(r"Who is Ada", (json.dumps(ADA), *(call(name, ADA) for name in ("Person", "PartialPerson", "final_result")))),
    Line(r"What were you told\?", (lambda prompt: f"I was told: {prompt.system}",)),
    Line(r"What did I say first\?", (lambda prompt: f"You said: {prompt.users[0]}",)),
    Line(r"Say something in Japanese", ("こんにちは 👩‍🚀 世界",)),
    Line(r"", (GREETING,)),
)  # fmt: skip


def replies(prompt: str) -> list[str]:
    """What may be said after a prompt, best first. Calls come only where the model was told of tools."""
    seen = Prompt.of(prompt)
    line = next(line for line in SCRIPT if re.search(line.pattern, seen.last))
    texts = [reply if isinstance(reply, str) else reply(seen) for reply in line.replies]
    return [text for text in texts if seen.has_tools or not text.startswith("<tool_call>")]
