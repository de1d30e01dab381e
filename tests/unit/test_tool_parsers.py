"""Tool calls in text: what is found, however the text is cut."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tools.formats import FORMATS
from server.tools.parsers import HermesParser, LlamaParser, MistralParser

NAMES = frozenset({"weather", "time"})
ARGUMENTS = '{"a": "}</tool_call>\\"", "b": [1, {}]}'


def read(parser, text, cuts=()):
    """`[kind, text]` pairs, neighbours of one kind joined."""
    reader = parser(NAMES)
    ends = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(ends)]
    joined = []
    for i, piece in enumerate(pieces):
        for found in reader.push(piece, last=i == len(pieces) - 1):
            if joined and joined[-1][0] == found.kind and found.kind != "call":
                joined[-1][1] += found.text
            else:
                joined.append([found.kind, found.text])
    return joined


CALL = [["call", "weather"], ["arguments", ARGUMENTS]]
TIME = [["call", "time"], ["arguments", '{"tz": 1}']]
CASES = [
    (HermesParser, f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>', CALL),
    (
        HermesParser,
        f'Hi <b>!\n\n<tool_call>{{"name":"weather","arguments":{ARGUMENTS}}}</tool_call>\n'
        '<tool_call>\n{"arguments": {"tz": 1}, "name": "time"}\n</tool_call>\n',
        [["text", "Hi <b>!"], *CALL, *TIME],
    ),
    (HermesParser, '<tool_call>{"name": "time"}</tool_call>', [["call", "time"], ["arguments", "{}"]]),
    (HermesParser, '<tool_call>{"id": "x", "name": "time", "arguments": {"tz": 1}}</tool_call>', TIME),
    (HermesParser, '<tool_call>{"name": "time", "arguments": {"tz', [["call", "time"], ["arguments", '{"tz']]),
    (LlamaParser, f'{{"name": "weather", "parameters": {ARGUMENTS}}}', CALL),
    (
        LlamaParser,
        f'<|python_tag|>{{"type": "function", "name": "weather", "parameters": {ARGUMENTS}}}; '
        '{"name": "time", "parameters": {"tz": 1}}',
        [*CALL, *TIME],
    ),
    (
        MistralParser,
        f'Well: [TOOL_CALLS] [{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "time", "arguments": {{"tz": 1}}}}]',
        [["text", "Well:"], *CALL, *TIME],
    ),
    (MistralParser, f'[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]time[CALL_ID]abc123def[ARGS]{{"tz": 1}}', [*CALL, *TIME]),
]  # fmt: skip

PLAIN = [
    (HermesParser, "a < b <tool_ca"),
    (HermesParser, "no\n <tool_call>maybe</tool_call> so"),
    (HermesParser, 'x <tool_call>{"name": "rm", "arguments": {}}</tool_call> y'),
    (HermesParser, '<tool_call>{"arguments": {}}</tool_call>'),
    (HermesParser, '<tool_call>{"name": "weather" "arguments": {}}'),
    (HermesParser, "  spaces at both ends \n"),
    (LlamaParser, 'Sure: {"name": "weather", "parameters": {}}'),
    (LlamaParser, '{"answer": 42}'),
    (LlamaParser, ""),
    (MistralParser, 'so [TOOL_CALLS]rm[ARGS]{"x": 1}'),
    (MistralParser, "[TOOL_CALLS] nothing like it"),
]


@pytest.mark.parametrize(
    ("parser", "text", "wanted"), [*CASES, *((p, t, [["text", t]] if t else []) for p, t in PLAIN)]
)
def test_what_is_found_does_not_depend_on_the_cuts(parser, text, wanted):
    assert read(parser, text) == wanted
    assert read(parser, text, range(1, len(text))) == wanted
    for size in (2, 3, 5, 11):
        assert read(parser, text, range(size, len(text), size)) == wanted


@pytest.mark.parametrize("name", FORMATS)
@given(
    calls=st.lists(
        st.tuples(
            st.sampled_from(sorted(NAMES)),
            st.dictionaries(
                st.text(max_size=5),
                st.recursive(st.text(max_size=8) | st.integers() | st.none(), st.lists, max_leaves=3),
            ),
        ),
        min_size=1,
        max_size=3,
    ),
    data=st.data(),
)
def test_what_a_format_writes_its_parser_reads(name, calls, data):
    form = FORMATS[name]
    text = form.first + form.between.join(form.opened(n) + json.dumps(a) + form.closing for n, a in calls) + form.end
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    found = read(form.parser, text, cuts)
    assert [f[1] for f in found if f[0] == "call"] == [n for n, _ in calls]
    assert [json.loads(f[1]) for f in found if f[0] == "arguments"] == [a for _, a in calls]
    assert all(f[0] != "text" for f in found)


@pytest.mark.parametrize(("parser", "before"), [(HermesParser, "Look: "), (MistralParser, "Look: ")])
def test_text_is_shown_at_once_and_arguments_as_they_come(parser, before):
    reader = parser(NAMES)
    assert "".join(f.text for f in reader.push(before, last=False)) == before.rstrip()
    marker = {
        HermesParser: '<tool_call>{"name": "weather", "arguments": {"a',
        MistralParser: '[TOOL_CALLS]weather[ARGS]{"a',
    }
    assert [(f.kind, f.text) for f in reader.push(marker[parser], last=False)] == [
        ("call", "weather"),
        ("arguments", '{"a'),
    ]
    assert [(f.kind, f.text) for f in reader.push('": 1', last=False)] == [("arguments", '": 1')]
