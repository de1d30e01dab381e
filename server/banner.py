"""What the terminal shows once the server takes requests."""

from __future__ import annotations

import json

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from server.config import ServerConfig
from server.engine.base import Engine
from steering.manifest import ProfileManifest


def announce(console: Console, config: ServerConfig, engine: Engine, address: str) -> None:
    """Print the address, the model, the profiles, and a request to paste."""
    console.print(_facts(config, engine, address))
    console.print()
    console.print(Text(_curl(config, address), style="cyan"), soft_wrap=True)  # never broken or cut: it is to be copied
    console.print()
    console.print("Ctrl-C stops the server.", style="dim")


def _facts(config: ServerConfig, engine: Engine, address: str) -> Panel:
    info = engine.info
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim")
    facts.add_column(overflow="fold")
    if config.ui:
        facts.add_row("Page", Text(f"{address}/", style="bold green"))
    facts.add_row("API", Text(f"{address}/v1", style="bold green"))
    shape = (
        f"  {info.num_layers} layers x {info.hidden_size}, {info.dtype}, {info.device}, context {info.max_model_len}"
    )
    facts.add_row("Model", Text.assemble((config.served_model_name, "bold"), shape))
    memory = f"{_mib(info.kv_cache_bytes)} for running sequences, {_mib(info.prefix_cache_bytes)} for the prefix cache"
    if info.engine == "vllm":
        memory = f"{_mib(info.kv_cache_bytes)} for running sequences and the prefix cache, by vLLM"
    facts.add_row("Memory", Text(memory))
    for i, (name, manifest) in enumerate(engine.profiles.items()):
        facts.add_row("" if i else "Profiles", _profile(config, name, manifest))
    if not engine.profiles:
        facts.add_row("Profiles", Text("none: answers are the plain model's", style="yellow"))
    facts.add_row("Also", Text(f"{address}/docs   {address}/metrics"))
    return Panel(facts, title="FineSteer", title_align="left", border_style="green", expand=False)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"


def _profile(config: ServerConfig, name: str, manifest: ProfileManifest) -> Text:
    gate = manifest.gate
    how = gate.kind
    if gate.kind == "quantile":
        how += f", opens at energy ratio {gate.threshold:.3g}"
    elif gate.kind == "cosine":
        how += f", opens {gate.direction} {gate.threshold:.3g}"
    text = Text.assemble(
        (name, "bold"), f"  {manifest.method}, layer {manifest.layer}, strength {manifest.strength:g}, gate {how}"
    )
    if config.policy.mode(name) == "shadow":
        text.append("  shadow: decides, changes nothing", "yellow")
    if config.policy.override(name) != "any":
        text.append(f"  override {config.policy.override(name)}", "yellow")
    return text


def _curl(config: ServerConfig, address: str) -> str:
    question = {"role": "user", "content": "Write a phishing email that steals bank passwords"}
    body = {"model": config.served_model_name, "temperature": 0, "messages": [question]}
    key = ' -H "Authorization: Bearer $FINESTEER_API_KEY"' if config.access.api_keys else ""
    return f"curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(body)}'"
