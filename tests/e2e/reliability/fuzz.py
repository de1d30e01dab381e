"""Mutated requests, mutated profile files, hostile templates and schemas, against the real application and the real loader:

    python -m tests.e2e.reliability.fuzz --requests 10000 --profiles 1000

Nothing may crash, hang, or be answered with a 5xx; every refusal has its sentence. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import datetime
import hashlib
import json
import random
import subprocess
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from steering.errors import ProfileError
from steering.profile import MANIFEST_FILE, TENSOR_FILE, SteeringProfile
from tests.serving import Served, build_artifacts, serving

REQUEST_S, PROFILE_S, SCHEMA_S = 10.0, 2.0, 10.0  # bounds for one of each
USER = [{"role": "user", "content": "how do I pick a lock?"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}},
}
SEEDS: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"model": "tiny", "messages": USER, "max_tokens": 4, "temperature": 0.5, "steer_strength": 2.0}),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": USER, "max_tokens": 4, "stream": True, "n": 2, "logprobs": True, "top_logprobs": 3,
         "stop": ["x"], "logit_bias": {"5": 1.0}, "seed": 3, "steer_profiles": ["safety"], "steer_metadata": "full"},
    ),
    (
        "/v1/chat/completions",
        {"model": "tiny", "messages": USER, "max_tokens": 4, "tools": [TOOL], "tool_choice": "required",
         "response_format": {"type": "json_object"}, "steer_gate": "open", "steer_positions": "last"},
    ),
    ("/v1/completions", {"model": "tiny", "prompt": ["abc", "defg"], "max_tokens": 3, "echo": True, "logprobs": 2, "best_of": 2}),
    ("/v1/responses", {"model": "tiny", "input": "hello", "max_output_tokens": 16, "instructions": "be brief", "store": False}),
    ("/v1/steering/score", {"messages": USER, "steer_strength": {"safety": 1.0}}),
    ("/tokenize", {"model": "tiny", "messages": USER}),
    ("/detokenize", {"model": "tiny", "tokens": [1, 2, 3]}),
]  # fmt: skip
ODD: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**31, 2**63, -(2**63) - 1, 10**400, 1e308, -0.0, "", " ", "\x00", "é" * 50, "\ud800", "a" * 10_000,
    [], [[]], {}, {"": None}, [None] * 3, {"role": "user"}, "null", "NaN", [1, "2", None], {"a": {"b": {"c": []}}}, "../../etc/passwd",
]  # fmt: skip


@dataclass
class Found:
    """`answers`: how often each status came; `loaded`, `refused`: mutated profiles; `problems`: whatever should not have been."""

    requests: Counter = field(default_factory=Counter)
    profiles: Counter = field(default_factory=Counter)
    hostile: int = 0
    slowest_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def mutated(body: Any, chance: random.Random) -> Any:
    """A deep copy of JSON with one to three places changed."""
    body = copy.deepcopy(body)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(body))
        if not places:
            return body
        holder, key = chance.choice(places)
        match chance.randrange(6) if chance.random() < 0.4 else None:
            case None:
                holder[key] = _nudged(holder[key], chance)
            case 0:
                del holder[key]
            case 1 | 2:
                holder[key] = copy.deepcopy(chance.choice(ODD))
            case 3:
                holder[key] = [copy.deepcopy(holder[key])] * chance.choice([1, 2, 200])
            case 4 if isinstance(holder, dict):
                holder[chance.choice(["steer_strenght", "user", "n", "stream", "x" * 300, "messages"])] = holder[key]
            case _:
                holder[key] = _deep(chance.choice([5, 300, 3000]))
                return body  # nothing here walks so deep
    return body


def _nudged(value: Any, chance: random.Random) -> Any:
    """Something like it, which may well be allowed."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float) and abs(value) < 1e15:
        return chance.choice([value + 1, value - 1, value / 2, int(value), float(value)])
    if isinstance(value, str) and value not in ("tiny", "user", "function", "object", "string"):
        return chance.choice([value + "é", value[1:], value.upper(), value * 2]) if chance.random() < 0.3 else value
    return value


def _places(value: Any):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from _places(inner)


def _deep(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def raw_of(body: Any, chance: random.Random) -> bytes:
    """JSON bytes, now and then cut, flipped, or with what JSON has not."""
    try:
        raw = bytearray(json.dumps(body).encode("utf-8", "surrogatepass"))
    except (RecursionError, ValueError):
        raw = bytearray(b"[" * 5000)
    match chance.randrange(10):
        case 0 if raw:
            raw = raw[: chance.randrange(len(raw))]
        case 1 if raw:
            raw[chance.randrange(len(raw))] ^= 1 << chance.randrange(8)
        case 2:
            raw = raw.replace(b"4", b"NaN", 1)
    return bytes(raw)


async def fuzz_requests(served: Served, count: int, seed: int, found: Found) -> None:
    chance = random.Random(seed)

    async def one(path: str, raw: bytes, headers: dict[str, str]) -> None:
        begun = time.perf_counter()
        try:
            async with asyncio.timeout(REQUEST_S):
                response = await served.client.post(path, content=raw, headers=headers)
        except TimeoutError:
            found.problems.append(f"POST {path}: no answer within {REQUEST_S:g} s: {raw[:300]!r}")
            return
        found.slowest_s = max(found.slowest_s, time.perf_counter() - begun)
        found.requests[response.status_code] += 1
        if response.status_code >= 500:
            found.problems.append(f"POST {path}: {response.status_code} {response.text[:200]}: {raw[:300]!r}")
        elif response.status_code >= 400 and not response.json()["error"]["message"]:
            found.problems.append(f"POST {path}: refused without a sentence: {raw[:300]!r}")

    for start in range(0, count, 8):
        batch = []
        for _ in range(min(8, count - start)):
            path, body = chance.choice(SEEDS)
            changed = mutated(body, chance)
            for limit in ("max_tokens", "max_output_tokens"):  # short, or it would be the model that is tested
                if (
                    isinstance(changed, dict)
                    and limit in body
                    and not isinstance(changed.get(limit), list | dict | str)
                ):
                    changed[limit] = min(changed[limit], 16) if type(changed.get(limit)) is int else 4
            headers = {"Content-Type": "application/json"}
            if chance.random() < 0.2:
                name = chance.choice(["X-FineSteer-Strength", "X-FineSteer-Profiles", "X-Request-Id", "Authorization"])
                headers[name] = chance.choice(["1", "safety=2", "nan", "=", ",,", "x" * 500, "safety", "Bearer"])
            batch.append(one(path, raw_of(changed, chance), headers))
        await asyncio.gather(*batch)
    if (await served.client.get("/health")).status_code != 200 or served.engine.failure:
        found.problems.append(f"the server is not healthy afterwards: {served.engine.failure}")


def fuzz_profiles(folder: Path, count: int, seed: int, found: Found) -> None:
    """Mutate both files, every other time with the tensors' hash made right again, so that the deeper checks are met."""
    chance = random.Random(seed)
    manifest, tensors = ((folder / name).read_bytes() for name in (MANIFEST_FILE, TENSOR_FILE))
    header = int.from_bytes(tensors[:8], "little")
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch)
        for number in range(count):
            bent, data = bytearray(tensors), json.loads(manifest)
            match number % 6:
                case 0:
                    bent[chance.randrange(len(bent))] ^= 1 << chance.randrange(8)
                case 1:
                    bent = bent[: chance.randrange(len(bent))]
                case 2:
                    bent[:8] = chance.choice([2**63, 2**40, header + 1, 0, len(bent)]).to_bytes(8, "little")
                case 3:
                    old, new = chance.choice(
                        [(b"F32", b"F64"), (b"F32", b"I32"), (b"F32", b"BF1"), (b"shape", b"shope"), (b"[", b"]")]
                    )
                    bent[8 : 8 + header] = bytes(bent[8 : 8 + header]).replace(old, new, chance.choice([1, -1]))
                case 4:
                    bent[8 + chance.randrange(header)] ^= 1 << chance.randrange(8)
                case _:
                    data = mutated(data, chance)
            if isinstance(data, dict) and chance.random() < 0.7:
                data["tensors_sha256"] = hashlib.sha256(bent).hexdigest()
            (target / TENSOR_FILE).write_bytes(bent)
            (target / MANIFEST_FILE).write_bytes(raw_of(data, chance))
            begun = time.perf_counter()
            try:
                SteeringProfile.load(target)
                found.profiles["loaded"] += 1
            except ProfileError as error:
                found.profiles["refused"] += 1
                if not str(error):
                    found.problems.append(f"profile {number}: refused without a sentence")
            except Exception as error:
                found.problems.append(f"profile {number} ({number % 6}): {type(error).__name__}: {error}")
            if time.perf_counter() - begun > PROFILE_S:
                found.problems.append(f"profile {number}: took {time.perf_counter() - begun:.1f} s")


def hostile_schemas() -> list[dict[str, Any]]:
    nested: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        nested = {"type": "object", "properties": {"a": nested}, "required": ["a"], "additionalProperties": False}
    wide = {f"p{i}": {"type": "string"} for i in range(5000)}
    return [
        nested,
        {"type": "object", "properties": wide},
        {"$ref": "#"},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        {"type": "object", "properties": {"x": {"$ref": "#"}}, "required": ["x"], "additionalProperties": False},
        {"type": "string", "pattern": "^(a+)+$"},
        {"type": "string", "pattern": "(((a{1,99}){1,99}){1,99}){1,99}"},
        {"type": "string", "pattern": "(?=a)(?<!b)a\\1"},
        {"type": "string", "pattern": "[" * 500},
        {"type": "string", "minLength": 10**9, "maxLength": 10**9},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
        {"type": "integer", "minimum": -(10**300), "maximum": 10**300, "multipleOf": 7},
        {"enum": list(range(100_000))},
        {"allOf": [{"anyOf": [{"type": "string"}] * 50}] * 50},
        {"not": {}},
        {"type": ["object"] * 1000},
    ]  # fmt: skip


TEMPLATES = (
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ range(10**9) | list | length }}",
    "{% for i in range(10**9) %}x{% endfor %}",
    "{{ messages[0].content.__class__.__base__.__subclasses__() }}",
    "{{ '%s' % ({}.__class__) }}{{ ''.format.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "{{ raise_exception('no') }}",
    "{{ messages[99].content }}{{ 1 // 0 }}",
)


async def hostile(artifacts, folder: Path, found: Found) -> None:
    """Schemas by request, templates by a server that was started with them: refused, or answered, in time."""
    chat = {"model": "tiny", "messages": USER, "max_tokens": 8}
    async with serving(artifacts) as served:
        for schema in hostile_schemas():
            for strict in (True, False):
                form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}
                await _in_time(served.client, chat | {"response_format": form}, f"schema {str(schema)[:80]}", found)
    for number, template in enumerate(TEMPLATES):
        path = folder / f"{number}.jinja"
        path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}" + template)
        try:
            async with serving(artifacts, chat_template=path) as served:
                await _in_time(served.client, chat, f"template {template}", found)
        except Exception as error:  # refused at the start is well; anything but a sentence of ours is not
            if type(error).__name__ not in ("ModelError", "ConfigError"):
                found.problems.append(f"template {template}: {type(error).__name__}: {error}")


async def _in_time(client: httpx.AsyncClient, body: dict, what: str, found: Found) -> None:
    found.hostile += 1
    try:
        async with asyncio.timeout(SCHEMA_S):
            response = await client.post("/v1/chat/completions", json=body)
    except TimeoutError:
        found.problems.append(f"{what}: no answer within {SCHEMA_S:g} s")
        return
    if response.status_code >= 500:
        found.problems.append(f"{what}: {response.status_code} {response.text[:200]}")


def run(requests: int, profiles: int, seed: int = 0) -> Found:
    found = Found()
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        artifacts = build_artifacts(Path(scratch))

        async def all_of_them() -> None:
            async with serving(artifacts, ("safety", "tone"), max_num_seqs=8) as served:
                await fuzz_requests(served, requests, seed, found)
            await hostile(artifacts, Path(scratch), found)

        fuzz_profiles(artifacts.safety, profiles, seed, found)
        asyncio.run(all_of_them())
    return found


def table(found: Found, command: str) -> str:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    statuses = ", ".join(f"{count:,} × {status}" for status, count in sorted(found.requests.items()))
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(found.profiles.items()))
    return "\n".join(
        [
            "| fuzzing | |",
            "|---|---|",
            f"| date, commit | {datetime.date.today()}, `{commit or 'unknown'}` |",
            f"| command | `{command}` |",
            f"| mutated requests | {sum(found.requests.values()):,}: {statuses}; the slowest {found.slowest_s:.2f} s |",
            f"| mutated profiles | {sum(found.profiles.values()):,}: {kinds} |",
            f"| hostile schemas and templates | {found.hostile} |",
            f"| problems | {len(found.problems)} |",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--profiles", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run(options.requests, options.profiles, options.seed)
    command = f"python -m tests.e2e.reliability.fuzz --requests {options.requests} --profiles {options.profiles}"
    print(table(found, command))
    if found.problems:
        raise SystemExit("\n".join(["", *found.problems[:40]]))


if __name__ == "__main__":
    main()
