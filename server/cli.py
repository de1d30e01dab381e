"""The `finesteer` command. Imports nothing heavy until a command needs it, so that `--help` is quick."""

from __future__ import annotations

import json
import secrets
import sys
from pathlib import Path
from typing import Annotated

import typer

from server import lab
from server.access.keys import digest
from server.config import ConfigError, ServerConfig
from server.listen import listen
from server.vllm_flags import FLAG_OPTION, gather

app = typer.Typer(
    name="finesteer",
    help="Serve a language model that is steered per query, and make the profiles that steer it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def finesteer() -> None:
    """Serve a language model that is steered per query, and make the profiles that steer it."""


@app.command()
def serve(
    model_argument: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="Folder or hub id. Without it: the embedded demo model and its profiles.",
            show_default=False,
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The same as MODEL.")] = None,
    profile: Annotated[
        list[str] | None, typer.Option(metavar="NAME=PATH", help="A steering profile's folder or hub id; repeatable.")
    ] = None,
    served_model_name: Annotated[str | None, typer.Option(help="The name clients use.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes any free one.")] = 8000,
    max_num_seqs: Annotated[int, typer.Option(help="Completions that run at once.")] = 32,
    max_model_len: Annotated[int | None, typer.Option(help="Prompt and answer tokens together.")] = None,
    max_batched_tokens: Annotated[
        int | None, typer.Option(help="Prompt tokens in one step: the most that running streams wait for.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(help="Requests that may queue; more get a 503.")] = 1024,
    request_timeout: Annotated[
        float, typer.Option(help="Seconds from a request's arrival to its answer's end; then it fails. 0: no limit.")
    ] = 600,
    read_timeout: Annotated[
        float, typer.Option(help="Seconds that a client may take to send a request's head, and then its body.")
    ] = 60,
    stall_timeout: Annotated[
        float, typer.Option(help="Seconds that a client may leave its answer unread before it is cut off.")
    ] = 60,
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running answers get to finish after SIGTERM or Ctrl-C.")
    ] = 25,
    kv_cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for running sequences' keys and values, e.g. 4GiB.")
    ] = None,
    prefix_cache_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for finished prompts; 0 switches the prefix cache off.")
    ] = None,
    responses_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for stored responses, 64MiB unless said; 0 stores none.")
    ] = None,
    num_threads: Annotated[int | None, typer.Option(help="CPU threads for the model.")] = None,
    compile: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile decoding (Llama and Mistral on a CPU; needs g++, twenty seconds at start, memory for the weights twice).",
        ),
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    engine: Annotated[
        str,
        typer.Option(
            help="native, or vllm: for models that need several cards. vLLM's own flags as --vllm.NAME, after MODEL: "
            "--vllm.gpu-memory-utilization 0.8."
        ),
    ] = "native",
    tensor_parallel_size: Annotated[int, typer.Option(help="Cards over which vLLM spreads each layer.")] = 1,
    vllm_one_pass: Annotated[
        bool,
        typer.Option(
            "--vllm-one-pass",
            help="Have vLLM decide and steer in a prompt's only pass: steered prompts start sooner, but none is cut in chunks or "
            "shares its beginning with another.",
        ),
    ] = False,
    vllm_flag: Annotated[list[str] | None, typer.Option(FLAG_OPTION, hidden=True)] = None,
    chat_template: Annotated[Path | None, typer.Option(help="A Jinja file in place of the model's own.")] = None,
    tool_format: Annotated[
        str | None,
        typer.Option(
            help="How the model writes tool calls, where its template does not show it: hermes, llama3, mistral or mistral-args."
        ),
    ] = None,
    max_steer_strength: Annotated[
        float, typer.Option(help="The largest strength, of either sign, a client may ask.")
    ] = 20,
    steering_metadata: Annotated[
        str, typer.Option(help="The most that answers tell of a decision: none, summary or full.")
    ] = "full",
    profile_policy: Annotated[
        list[str] | None, typer.Option(metavar="NAME=any|raise_only|none", help="What clients may change; repeatable.")
    ] = None,
    profile_mode: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=enforce|shadow", help="shadow decides and reports only; repeatable."),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Ask clients for this key; repeatable. Better set FINESTEER_API_KEY (several with commas): arguments can be seen."
        ),
    ] = None,
    api_keys_file: Annotated[
        Path | None, typer.Option(help="JSON file of hashed keys, each with its name and limits: see the README.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(help="Lets whoever has it load and unload profiles. Better set FINESTEER_ADMIN_KEY."),
    ] = None,
    allow_no_key: Annotated[
        bool, typer.Option("--allow-no-key", help="Listen beyond this machine without asking for a key.")
    ] = False,
    guard_metrics: Annotated[bool, typer.Option("--guard-metrics", help="Ask for a key at /metrics too.")] = False,
    isolate_keys: Annotated[
        bool,
        typer.Option(
            "--isolate-keys", help="Share nothing of the prefix cache between keys: its speed tells of others."
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="Let pages from there call the API, * for any; repeatable. Default: none."),
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    log_format: Annotated[str, typer.Option(help="human, or json: one object a line.")] = "human",
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Show prompts in the log.")] = False,
    metrics_compat: Annotated[
        str | None, typer.Option(metavar="vllm", help="Give the generic metrics under vLLM's names, too.")
    ] = None,
    no_ui: Annotated[bool, typer.Option("--no-ui", help="Serve the API alone, no page at /.")] = False,
    audit_log: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append a JSON line for each steering decision of an answer.")
    ] = None,
    audit_log_max_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="The audit log is rotated at this size, 100MiB unless said.")
    ] = None,
    audit_log_keep: Annotated[int, typer.Option(help="Rotated audit logs that are kept.")] = 10,
    audit_log_required: Annotated[
        bool, typer.Option("--audit-log-required", help="Answer nothing (503) while the audit log cannot be written.")
    ] = False,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Send OpenTelemetry spans there, OTLP over HTTP; needs the otel extra."),
    ] = None,
) -> None:
    """Serve an OpenAI-compatible API."""
    try:
        if None not in (model, model_argument) and model != model_argument:
            raise ConfigError(f"--model {model}: the model is {model_argument} already; give one.")
        config = ServerConfig.from_options(
            model=model or model_argument,
            profiles=profile or (),
            served_model_name=served_model_name,
            profile_policies=profile_policy or (),
            profile_modes=profile_mode or (),
            max_steer_strength=max_steer_strength,
            steering_metadata=steering_metadata,
            api_keys=api_key or (),
            api_keys_file=api_keys_file,
            admin_key=admin_key,
            guard_metrics=guard_metrics,
            isolate_keys=isolate_keys,
            allow_no_key=allow_no_key,
            cors_origins=cors_origin or (),
            host=host,
            port=port,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_batched_tokens=max_batched_tokens,
            max_waiting=max_waiting,
            request_timeout_s=request_timeout,
            read_timeout_s=read_timeout,
            stall_timeout_s=stall_timeout,
            shutdown_timeout_s=shutdown_timeout,
            kv_cache_memory=kv_cache_memory,
            prefix_cache_memory=prefix_cache_memory,
            responses_memory=responses_memory,
            num_threads=num_threads,
            compile=compile,
            dtype=dtype,
            device=device,
            engine=engine,
            tensor_parallel_size=tensor_parallel_size,
            vllm_one_pass=vllm_one_pass,
            vllm_flags=tuple(vllm_flag or ()),
            chat_template=chat_template,
            tool_format=tool_format,
            log_level=log_level,
            log_format=log_format,
            log_prompts=log_prompts,
            metrics_compat=metrics_compat,
            ui=not no_ui,
            audit_log=audit_log,
            audit_log_max_bytes=audit_log_max_bytes,
            audit_log_keep=audit_log_keep,
            audit_log_required=audit_log_required,
            otlp_endpoint=otlp_endpoint,
        )
        listener = listen(config.host, config.port)
        from server.serve import run  # torch and transformers: seconds, which a misconfiguration need not cost

        run(config, listener)
    except ConfigError as error:
        raise fail(str(error)) from error


@app.command()
def key(name: Annotated[str, typer.Argument(help="Whose key it is, for the log.")] = "client") -> None:
    """Make an API key: prints it, for the client, and its entry for --api-keys-file, which holds its hash alone."""
    made = f"fs-{secrets.token_urlsafe(32)}"
    typer.echo(made)
    typer.echo(json.dumps({"name": name, "sha256": digest(made)}))


def fail(message: str) -> typer.Exit:
    """Say what is wrong in one sentence; raise what this returns: exit code 2, no traceback."""
    typer.echo(f"finesteer: {message}", err=True)
    return typer.Exit(2)


lab.register(app)


def main() -> None:
    """The console script's entry."""
    app(args=gather(sys.argv[1:]))
