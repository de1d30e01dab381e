"""What the routes work with: the engine, the prompter, the metrics and the operator's rules, put together once."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from server.answers.generation import Generation
from server.answers.parts import Turn
from server.answers.response_store import ResponseStore
from server.config import ServerConfig
from server.conversation import Conversation
from server.draining import Draining
from server.engine.base import Engine, GenerationRequest, Grammar, SamplingOptions
from server.errors import AuditUnavailableError, InvalidRequestError, NotFoundError
from server.grammar.compiler import GrammarCompiler
from server.observability.audit import AuditLog
from server.observability.metrics import Metrics
from server.profile_folders import ProfileFolders
from server.prompting.prompter import Prompter
from server.steering_options import Resolved, SteeringHeaders, alias_profiles, resolve
from server.steering_settings import SteeringSettings
from server.tools.plan import plan_answer
from server.wire.sampling import SamplingFields
from server.wire.steering import SteeringFields
from steering.decision import SteeringOptions
from steering.manifest import ProfileManifest


@dataclass
class Uploads:
    """`num_bytes`: of the bodies that are being read."""

    num_bytes: int = 0


@dataclass(frozen=True)
class Service:
    """The same for the life of the process; what changes is what `responses`, `settings`, `folders` and the engine's profiles hold."""

    config: ServerConfig
    engine: Engine
    prompter: Prompter
    metrics: Metrics
    grammars: GrammarCompiler
    created: int = field(default_factory=lambda: int(time.time()))
    responses: ResponseStore = field(default_factory=ResponseStore)
    draining: Draining = field(default_factory=Draining)
    uploads: Uploads = field(default_factory=Uploads)
    audit: AuditLog | None = None
    settings: SteeringSettings = field(init=False)
    folders: ProfileFolders = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", SteeringSettings(self.config.policy))
        object.__setattr__(self, "folders", ProfileFolders(self.config.profiles))

    @property
    def model(self) -> str:
        """The model's public name."""
        return self.config.served_model_name

    @property
    def fingerprint(self) -> str:
        """Changes when anything does that may change an answer: model, engine, dtype, profiles."""
        info = self.engine.info
        parts = [info.engine, info.model, info.dtype, *(manifest.version for manifest in self.engine.profiles.values())]
        return "fs_" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    def settle(self, model: str | None, fields: SteeringFields, headers: SteeringHeaders) -> Resolved:
        """The request's steering, its model name taken into account. Raises NotFoundError for an unknown model."""
        settings = self.settings
        alias = self.check_model(model)
        return resolve(fields, headers, alias, self.engine.profiles, settings.policy, settings.defaults)

    def check_model(self, model: str | None) -> tuple[str, ...] | None:
        """The profiles that a model's name stands for; None where it names none. Raises NotFoundError for an unknown model."""
        try:
            return None if model is None else alias_profiles(model, self.model, self.engine.profiles)
        except KeyError as error:
            raise NotFoundError(
                f"model: {model!r} is not served here; this server has {self.model!r}. GET /v1/models lists every name.",
                param="model",
                code="model_not_found",
            ) from error

    def profile(self, name: str) -> ProfileManifest:
        """A loaded profile's manifest. Raises NotFoundError where there is none of that name."""
        manifest = self.engine.profiles.get(name)
        if manifest is None:
            loaded = ", ".join(self.engine.profiles) or "none"
            raise NotFoundError(
                f"No profile {name!r} is loaded. Loaded: {loaded}.", param="name", code="unknown_profile"
            )
        return manifest

    def request(
        self,
        request_id: str,
        prompt: tuple[int, ...],
        steering: SteeringOptions,
        fields: SamplingFields,
        *,
        limit: int | None,
        logprobs: int | None,
        param: str,
        grammar: Grammar | None = None,
        n: int | None = None,
        prompt_logprobs: int | None = None,
        priority: int | None = None,
        cache_owner: str = "",
    ) -> GenerationRequest:
        """The engine's request for one prompt.

        Args:
            limit: the most tokens a completion may have; it is an upper bound, so less room in the context lowers it.
            param: the field that holds the prompt, for messages.
            grammar: what each completion must spell.
            n: completions to make, if not the fields' n.
            prompt_logprobs: as `SamplingOptions.prompt_logprobs`.
            priority: lower runs earlier (vLLM's meaning, and the engine's); None is 0.
            cache_owner: see `GenerationRequest`.
        Raises:
            InvalidRequestError.
        """
        self.check_prompt(prompt, param)
        room = self.engine.info.max_model_len - len(prompt)
        max_tokens = room if limit is None else min(limit, room)
        n = n or fields.n or 1
        self._check_sampling(fields, max_tokens, n)
        stop_ids = frozenset(fields.stop_token_ids or ())
        sampling = SamplingOptions(
            max_tokens=max_tokens,
            temperature=_or(fields.temperature, 1.0),
            top_p=_or(fields.top_p, 1.0),
            top_k=max(_or(fields.top_k, 0), 0),
            min_p=_or(fields.min_p, 0.0),
            presence_penalty=_or(fields.presence_penalty, 0.0),
            frequency_penalty=_or(fields.frequency_penalty, 0.0),
            repetition_penalty=_or(fields.repetition_penalty, 1.0),
            logit_bias=fields.logit_bias,
            seed=fields.seed,
            stop_token_ids=stop_ids if fields.ignore_eos else stop_ids | self.prompter.eos_token_ids,
            min_tokens=_or(fields.min_tokens, 0),
            logprobs=logprobs,
            grammar=grammar,
            prompt_logprobs=prompt_logprobs,
        )
        return GenerationRequest(
            request_id, prompt, sampling, steering, n=n, priority=priority or 0, cache_owner=cache_owner
        )

    def check_prompt(self, prompt: tuple[int, ...], param: str) -> None:
        """Raise InvalidRequestError unless the prompt has tokens, knows only the model's, and leaves room for one more."""
        info = self.engine.info
        if not prompt:
            raise InvalidRequestError(f"{param}: has no tokens; the model needs at least one.", param=param)
        if (worst := max(prompt)) >= info.vocab_size:
            raise InvalidRequestError(
                f"{param}: token id {worst} is outside the model's vocabulary (0 to {info.vocab_size - 1}).",
                param=param,
            )
        if len(prompt) >= info.max_model_len:
            raise InvalidRequestError(
                f"{param}: the prompt has {len(prompt)} tokens, and this model's context holds {info.max_model_len} for prompt "
                f"and answer together. Shorten the prompt to at most {info.max_model_len - 1} tokens.",
                param=param,
                code="context_length_exceeded",
            )

    async def converse(
        self,
        request_id: str,
        conversation: Conversation,
        steering: SteeringOptions,
        fields: SamplingFields,
        *,
        limit: int | None,
        logprobs: int | None,
        param: str,
        prompt_logprobs: int | None = None,
        priority: int | None = None,
        cache_owner: str = "",
        deadline_s: float | None = None,
    ) -> Turn:
        """The assistant's turn in a conversation, not yet begun; arguments and errors as for `request` and `generation`."""
        prompt = await self.prompter.chat(conversation)
        plan = await plan_answer(conversation, self.prompter.tools.format, self.grammars)
        request = self.request(
            request_id,
            prompt,
            steering,
            fields,
            limit=limit,
            logprobs=logprobs,
            param=param,
            grammar=plan.grammar,
            prompt_logprobs=prompt_logprobs,
            priority=priority,
            cache_owner=cache_owner,
        )
        generation = self.generation(request, fields.stop, plan.markers, deadline_s=deadline_s)
        return Turn(generation, plan.new_parser, plan.new_call_id, plan.called)

    def generation(
        self,
        request: GenerationRequest,
        stops: Sequence[str],
        markers: Sequence[str] = (),
        *,
        deadline_s: float | None = None,
        **options: bool,
    ) -> Generation:
        """A run of `request`, not yet begun. `markers`: special tokens that are shown nevertheless; `options` as `Generation` has them.

        Raises AuditUnavailableError where the answer could not be audited, and must be.
        """
        if self.audit is not None and (refusal := self.audit.refusal) is not None:
            raise AuditUnavailableError(
                f"This server answers nothing that it cannot put into its audit log, and {refusal}. Its operator must help."
            )
        vocabulary = self.prompter.vocabulary
        shown = vocabulary.showing(markers) if markers else vocabulary
        return Generation(self.engine, request, shown, stops, self.metrics, deadline_s=deadline_s, **options)

    def _check_sampling(self, fields: SamplingFields, max_tokens: int, n: int) -> None:
        info = self.engine.info
        if n > info.max_num_seqs:
            param = "n" if n == fields.n else "best_of"
            raise InvalidRequestError(
                f"{param}: this server runs at most {info.max_num_seqs} completions at once.", param=param
            )
        if _or(fields.min_tokens, 0) > max_tokens:
            raise InvalidRequestError(
                f"min_tokens: must be at most max_tokens, which is {max_tokens} for this prompt.", param="min_tokens"
            )
        for param, ids in (("logit_bias", fields.logit_bias), ("stop_token_ids", fields.stop_token_ids or ())):
            if ids and (worst := max(ids)) >= info.vocab_size:
                raise InvalidRequestError(
                    f"{param}: token id {worst} is outside the model's vocabulary (0 to {info.vocab_size - 1}).",
                    param=param,
                )


def new_id(prefix: str) -> str:
    """`prefix` and 32 random hex digits."""
    return f"{prefix}{uuid.uuid4().hex}"


def _or(value, default):
    return default if value is None else value
