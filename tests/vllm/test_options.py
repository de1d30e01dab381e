"""vLLM's flags as vLLM takes them, and what steering cannot be had with: refused by name, before anything is started."""

from __future__ import annotations

import pytest

from server.engine.vllm.options import VllmOptions, vllm_config
from server.engine.vllm.settings import PluginSettings
from steering.errors import ModelError
from tests.running_vllm import vllm_folder

SETTINGS = PluginSettings((1,))


def configured(*flags: str, **options: object):
    return vllm_config(str(vllm_folder()), VllmOptions(dtype="float32", flags=flags, **options), SETTINGS)


def test_vllms_flags_and_this_servers_reach_vllm():
    config = configured(
        "--block-size", "32", "--enforce-eager", "--gpu_memory_utilization=0.5", max_num_seqs=7, max_model_len=128
    )
    assert config.cache_config.block_size == 32 and config.model_config.enforce_eager
    assert config.cache_config.gpu_memory_utilization == 0.5
    assert (config.scheduler_config.max_num_seqs, config.model_config.max_model_len) == (7, 128)
    assert config.scheduler_config.policy == "priority"
    assert PluginSettings.from_config(config.additional_config) == SETTINGS


def test_the_sites_are_part_of_what_vllms_compile_cache_goes_by():
    one, same, other = (
        vllm_config(str(vllm_folder()), VllmOptions(dtype="float32"), PluginSettings(layers)).compute_hash()
        for layers in ((1,), (1,), (2,))
    )
    assert one == same != other


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--pipeline-parallel-size", "2"), "--vllm.pipeline-parallel-size cannot be used with steering"),
        (("--enable-lora",), "--vllm.enable-lora cannot be used with steering"),
        (
            ("--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}'),
            "--vllm.speculative-config cannot be used with steering",
        ),
        (("--worker-cls", "somebody.elses.Own"), "--vllm.worker-cls cannot be used with steering"),
        (
            ("--kv-transfer-config", '{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}'),
            "--vllm.kv-transfer-config",
        ),
        (("--no-such-thing", "1"), "--vllm.no-such-thing: vLLM has no such option."),
        (("--block-size", "many"), "--vllm.…: vLLM does not take it"),
        (("--block-size", "-3"), "--engine vllm: vLLM refuses this configuration"),
        (("--tensor-parallel-size", "2"), "--vllm.tensor-parallel-size: use --tensor-parallel-size."),
        (("--max_model_len=64",), "--vllm.max-model-len: use --max-model-len."),
        (("--no-enable-prefix-caching",), "--vllm.no-enable-prefix-caching: use --prefix-cache-memory 0."),
        (("--scheduling-policy", "fcfs"), "--vllm.scheduling-policy: use nothing"),
        (("--model", "x"), "--vllm.model: use the model's place on the command line."),
    ],
)
def test_what_cannot_be_is_refused_by_name(flags, said):
    with pytest.raises(ModelError) as refusal:
        configured(*flags)
    assert str(refusal.value).startswith(said) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--enable-chunked-prefill",), "--vllm.enable-chunked-prefill: not with --vllm-one-pass"),
        (("--long-prefill-token-threshold", "8"), "--vllm-one-pass: prompts must not be cut"),
        ((), "--engine vllm: vLLM refuses this configuration"),
    ],
    ids=["chunks", "a threshold for long prompts", "fewer tokens a step than a prompt may have"],
)
def test_one_pass_needs_whole_prompts(flags, said):
    tokens = 256 if flags else 32
    with pytest.raises(ModelError) as refusal:
        configured(*flags, one_pass=True, max_model_len=256, max_batched_tokens=tokens)
    assert str(refusal.value).startswith(said)


def test_on_a_cpu_vllms_variable_for_the_cache_and_ours_are_not_given_both(monkeypatch):
    assert configured().cache_config.kv_cache_memory_bytes == 4 * 2**30
    assert configured(kv_cache_bytes=2**28).cache_config.kv_cache_memory_bytes == 2**28
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert configured().cache_config.kv_cache_memory_bytes == 2**30
    with pytest.raises(ModelError, match="VLLM_CPU_KVCACHE_SPACE is set"):
        configured(kv_cache_bytes=2**28)
