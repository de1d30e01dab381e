"""vLLM's flags on the command line, and what belongs to one engine alone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from server.config import ConfigError
from server.vllm_flags import gather
from tests.unit.test_config import configure


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["serve", "--port", "1"], ["serve", "--port", "1"]),
        (
            ["serve", "m", "--vllm.block-size", "32", "--port", "1"],
            ["serve", "m", "--vllm-flag=--block-size", "--vllm-flag=32", "--port", "1"],
        ),
        (["serve", "--vllm.block-size=32", "--port=1"], ["serve", "--vllm-flag=--block-size=32", "--port=1"]),
        (
            ["serve", "--vllm.enforce-eager", "--vllm.x", "-1", "a", "b"],
            [
                "serve",
                "--vllm-flag=--enforce-eager",
                "--vllm-flag=--x",
                *(f"--vllm-flag={v}" for v in ("-1", "a", "b")),
            ],
        ),
    ],
)
def test_a_flag_takes_the_words_up_to_the_next_option(words, wanted):
    assert gather(words) == wanted


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"engine": "sglang"}, "--engine: must be native or vllm, not 'sglang'."),
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size: only vLLM has that; add --engine vllm."),
        ({"tensor_parallel_size": 0}, "--tensor-parallel-size 0 must be at least 1."),
        ({"vllm_one_pass": True}, "--vllm-one-pass: only vLLM has that; add --engine vllm."),
        ({"vllm_flags": ("--block-size", "32")}, "--vllm.block-size: only vLLM has that; add --engine vllm."),
        ({"engine": "vllm", "compile": True}, "--compile is not for --engine vllm: vLLM compiles by itself"),
        ({"engine": "vllm", "device": "cuda:1"}, "--device is not for --engine vllm: vLLM takes the cards it sees"),
        ({"engine": "vllm", "num_threads": 2}, "--num-threads is not for --engine vllm"),
        ({"engine": "vllm", "prefix_cache_memory": "1GiB"}, "--prefix-cache-memory is not for --engine vllm"),
    ],
)
def test_what_an_engine_does_not_have_is_refused_by_name(options, said):
    with pytest.raises(ConfigError) as refusal:
        configure(**options)
    assert str(refusal.value).startswith(said)


def test_vllm_takes_its_flags_and_no_prefix_cache():
    config = configure(
        engine="vllm", tensor_parallel_size=2, vllm_flags=("--block-size", "32"), prefix_cache_memory="0"
    )
    assert (config.engine, config.tensor_parallel_size, config.vllm_flags) == ("vllm", 2, ("--block-size", "32"))


def serve(*words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--port", "0", *words], capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


def test_the_model_is_given_once():
    assert serve("a/b", "--model", "a/c") == (2, "finesteer: --model a/c: the model is a/b already; give one.\n")


def test_the_command_line_gives_vllms_flags_to_vllm_alone():
    code, said = serve("--vllm.block-size", "32")
    assert (code, said) == (2, "finesteer: --vllm.block-size: only vLLM has that; add --engine vllm.\n")


def test_the_main_environment_imports_no_vllm():
    """Native is the default, and does not even look for it."""
    code = (
        "import sys; import server.serve, server.cli, server.engine.native.load, server.engine.vllm.load, server.engine.vllm.plugin;"
        "sys.exit(any(name == 'vllm' or name.startswith('vllm.') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
