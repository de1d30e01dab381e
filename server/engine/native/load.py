"""From a model reference and profile paths to a running-ready engine, with every way it can go wrong put into a sentence."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.engine.base import EngineObserver
from server.engine.native.build import EngineOptions
from server.engine.native.decoder import Decoder, TransformersDecoder
from server.engine.native.device_map import DeviceMap, check_device_map
from server.engine.native.engine import NativeEngine
from server.engine.native.fused import FAMILIES, FusedDecoder
from server.engine.native.selftest import check_steering, decoder_error, reference_logits
from steering.architecture import decoder_layers, text_config
from steering.errors import ModelError
from steering.profile import SteeringProfile

logger = logging.getLogger(__name__)
DEFAULT_MAX_MODEL_LEN = 4096
SUPPORTED_LAYER_TYPES = {"full_attention", "sliding_attention"}


def load_engine(
    model: str,
    profiles: Mapping[str, str],
    *,
    dtype: str = "auto",
    device: str = "auto",
    max_model_len: int | None = None,
    num_threads: int | None = None,
    compiled: bool = False,
    observer: EngineObserver | None = None,
    **options: int | bool | None,
) -> NativeEngine:
    """Load a checkpoint and its profiles, prove that our forward pass is the model's own and that the profiles act, and
    build the engine.

    Args:
        model: a folder or a hub id.
        profiles: name → folder or hub id, in the order in which they are to be listed.
        dtype: "auto" (the checkpoint's; on a CPU float32 for float16, and for bfloat16 where the processor has no kernels for
            it), or a torch dtype's name.
        device: "auto" (CUDA where there is one), "cpu", "cuda", "cuda:1", …
        max_model_len: default: the model's own limit, at most 4096.
        num_threads: torch's CPU threads; default torch's.
        compiled: decode by compiled kernels; takes a C++ compiler, some twenty seconds, and a second copy of the weights.
        options: the rest of `EngineOptions`.
    Raises:
        ModelError, ProfileError.
    """
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    loaded = load_model(model, dtype=dtype, device=device)
    limit = getattr(text_config(loaded), "max_position_embeddings", None) or DEFAULT_MAX_MODEL_LEN
    length = max_model_len or min(limit, DEFAULT_MAX_MODEL_LEN)
    if length > limit:
        raise ModelError(f"--max-model-len {length} is more than the {limit} positions that {model} was made for.")
    loaded_profiles = [SteeringProfile.load(path, name) for name, path in profiles.items()]
    decoder = make_decoder(loaded, length, lambda: load_model(model, dtype=dtype, device=device), compiled=compiled)
    check_steering(decoder, loaded, loaded_profiles)
    engine = NativeEngine(
        decoder,
        loaded,
        loaded_profiles,
        EngineOptions(max_model_len=length, **options),
        model_name=model,
        observer=observer,
    )
    if compiled:
        engine.warm_up()
    return engine


def load_model(
    model: str, *, dtype: str = "auto", device: str = "auto", device_map: DeviceMap | None = None
) -> PreTrainedModel:
    """A checkpoint of a decoder-only transformers model. Raises ModelError.

    `device_map`: where its parts go, in place of one `device`; only reading states works with it.
    """
    place = _device(device)
    try:
        config = AutoConfig.from_pretrained(model)
        if isinstance(device_map, dict):
            check_device_map(device_map, config, _device)
        loaded = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=_dtype(dtype, config, place), device_map=device_map
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"cannot load model {model!r}: {str(error).splitlines()[0]} Give a folder with config.json and "
            "safetensors weights, or a hub id of a decoder-only transformers model."
        ) from error
    loaded = (loaded.to(place) if device_map is None else loaded).eval()
    decoder_layers(loaded)
    return loaded


def make_decoder(
    model: PreTrainedModel,
    max_len: int = DEFAULT_MAX_MODEL_LEN,
    reload: Callable[[], PreTrainedModel] | None = None,
    *,
    compiled: bool = False,
) -> Decoder:
    """The fastest decoder that computes what transformers computes, for `max_len` positions. Takes the model over.

    Args:
        reload: gives the model once more, for where the fused forward turns out to differ.
        compiled: decode by compiled kernels, or raise.
    Raises:
        ModelError: neither way computes it.
    """
    name = type(model).__name__
    odd = set(getattr(text_config(model), "layer_types", None) or ()) - SUPPORTED_LAYER_TYPES
    if odd or not model._supports_attention_backend:
        what = f"layers of type {', '.join(sorted(odd))}" if odd else "attention that cannot be replaced"
        raise ModelError(f"{name}: this architecture has {what}, which the native engine does not run.")
    if compiled:
        _check_compiler(model)
    wanted = reference_logits(model)
    if text_config(model).model_type in FAMILIES:
        decoder: Decoder = FusedDecoder(model, max_len, compiled=compiled)
        error = decoder_error(decoder, wanted)
        if error < 1:
            return decoder
        logger.warning(
            "%s: the fused forward is off by %.1f times rounding; transformers' modules run instead", name, error
        )
        if reload is None:
            raise _differs(name, error)
        model = reload()
    decoder = TransformersDecoder(model)
    error = decoder_error(decoder, wanted)
    if not error < 1:
        raise _differs(name, error)
    return decoder


def _check_compiler(model: PreTrainedModel) -> None:
    """Raise ModelError where `--compile` cannot work."""
    from torch._inductor import config

    if text_config(model).model_type not in FAMILIES:
        raise ModelError(f"--compile: {type(model).__name__} has no compiled kernels; start without it.")
    if not any(name and shutil.which(name) for name in config.cpp.cxx):
        raise ModelError("--compile needs a C++ compiler such as g++; install one, or start without it.")


def _differs(name: str, error: float) -> ModelError:
    return ModelError(
        f"{name}: the native engine's logits differ from transformers' by {error:.1f} times what rounding explains. This "
        "architecture needs something that the engine does not know; it is refused rather than served wrongly."
    )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ModelError(f"--device {device!r} is no device; use auto, cpu, cuda or cuda:N.") from error
    if place.type == "meta":
        raise ModelError(f"--device {device!r} holds no weights; use auto, cpu, cuda or cuda:N.")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ModelError(f"--device {device}: torch {torch.__version__} sees no CUDA device here; use cpu.")
    return place


def _dtype(dtype: str, config, place: torch.device) -> torch.dtype:
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise ModelError(f"--dtype {dtype!r} is no floating-point dtype; use auto, float32, bfloat16 or float16.")
        return found
    stored = config.dtype or torch.float32
    slow = stored == torch.float16 or (stored == torch.bfloat16 and not _bfloat16_is_fast())
    return torch.float32 if place.type == "cpu" and slow else stored


def _bfloat16_is_fast() -> bool:
    """Whether this processor has bfloat16 kernels, by oneDNN's own check."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
