"""What every handler needs: the backend, the texts, the model's limits and defaults, and the server's readiness."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from starlette.requests import Request

from elastic_moe.actors.coordinator.coordinator import Coordinator
from elastic_moe.actors.remote.key_value import KeyValue, LocalKeyValue
from elastic_moe.actors.telemetry.exporting import Exporter
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import NotReadyError, RequestError, UserError
from elastic_moe.cluster.lines import counted
from elastic_moe.cluster.messages.epochs import ModelInfo
from elastic_moe.cluster.messages.grammars import Grammar
from elastic_moe.cluster.messages.requests import GenerateRequest, RequestId, SamplingParams
from elastic_moe.cluster.messages.views import Readiness
from elastic_moe.cluster.redeploy import in_force
from elastic_moe.deploy.api.sampling import Limits, SamplingDefaults, check_token_ids, seed_of_choice
from elastic_moe.deploy.backend.backend import Backend
from elastic_moe.deploy.bodies.aside import Aside
from elastic_moe.deploy.bodies.bodies import Bodies
from elastic_moe.deploy.bodies.bounds import TokenIds
from elastic_moe.deploy.bodies.messages import Message
from elastic_moe.deploy.bodies.schema import ChatCompletionRequest, SamplingFields, TemplateFields, parse
from elastic_moe.deploy.bodies.structured import StructuredFields
from elastic_moe.deploy.generation.answer import Answer, Delta, answer_deltas, merged
from elastic_moe.deploy.generation.metrics import Metrics
from elastic_moe.deploy.generation.places import Places
from elastic_moe.deploy.generation.shortcut import Shortcut
from elastic_moe.deploy.parsing.formats import AnswerForm
from elastic_moe.deploy.parsing.parser import AnswerParser
from elastic_moe.deploy.responses.following import Following, Lives
from elastic_moe.deploy.responses.record import Record, call_ids
from elastic_moe.deploy.responses.rendering import Rendering
from elastic_moe.deploy.responses.store import Bounds, Store
from elastic_moe.deploy.structured.checks import GrammarChecks
from elastic_moe.deploy.structured.requested import requested_grammar
from elastic_moe.deploy.text.texts import OpenPrompts, Texts
from elastic_moe.deploy.tools.form import answer_form
from elastic_moe.deploy.tools.plan import NewParser, tool_plan
from elastic_moe.deploy.web.running import Running

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 1024
"""Most answers of one request: its prompts times n."""
ANSWERS_AT_ONCE = 16
"""Answers that are made before other requests get their turn."""
PROMPT_END = 256
"""Tokens at the end of a prompt in which the answer may begin, as a chat template writes it."""
RETRY_S = 0.1


@cache
def version() -> str:
    return metadata.version("elastic-moe")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    token_ids: TokenIds
    params: SamplingParams
    param: str
    """The field that the prompt came from, for error messages."""
    text: str = ""
    """The text to put before the answer, where the request asks for an echo."""
    rendered: str = ""
    """What the chat template has made of the messages."""
    new_parser: NewParser | None = None
    """Makes the parser of an answer, where reasoning or tool calls are looked for."""
    markers: Mapping[int, str] = dataclasses.field(default_factory=dict)
    """The special tokens that the parser must see, with their texts."""


class Service:
    """There is one in a replica. `begin` loads the tokenizer; the server is not ready before that."""

    def __init__(
        self,
        config: ServeConfig,
        backend: Backend,
        model_dir: str,
        open_prompts: OpenPrompts | None = None,
        values: KeyValue | None = None,
        generation: str = "",
        lives: Lives | None = None,
    ) -> None:
        """`open_prompts`: as Texts.open has it. `values` is what all replicas share; without it, this one shares
        nothing. `generation` and `lives`: as Following has them."""
        self.config = config
        self.backend = backend
        self.model_dir = model_dir
        self.model_name = config.served_model_name or Path(model_dir).resolve().name
        values = values or LocalKeyValue()
        self.metrics = Metrics(
            self.model_name, values, log_requests=config.enable_log_requests, engines=backend.num_groups
        )
        self.created = int(time.time())
        self.draining = False
        """Whether the server stops: running requests go on, and new ones are refused."""
        self.requests = Running()
        """What runs and ends with its connection."""
        digest = hashlib.blake2b(f"{version()} {self.model_name} {config.dtype}".encode(), digest_size=5).hexdigest()
        self.fingerprint = f"emoe-{version()}-{digest}"
        self.defaults = SamplingDefaults()
        bounds = Bounds(
            most=config.max_stored_responses,
            most_bytes=config.stored_responses_memory_bytes,
            oldest_s=config.stored_responses_ttl,
        )
        self.store = Store(values, bounds)
        self.generation = generation
        self.following = Following(backend.engine, self.store, self.metrics, self.rendering, generation, lives)
        self._open_prompts = open_prompts
        self.places = Places(config.max_waiting_requests)
        self.aside = Aside()
        self.bodies = Bodies(self.aside)
        self._texts: Texts | None = None
        self._begun = False
        self._tokenizer_error: str | None = None
        self._grammars = GrammarChecks()
        self._info: ModelInfo | None = None
        self.form = AnswerForm()
        """How the model writes reasoning and tool calls."""

    async def begin(self) -> None:
        self.metrics.exporter = await asyncio.to_thread(Exporter.open, self.config, "api", self.model_name)
        try:
            self.defaults = SamplingDefaults.read(self.model_dir)
            self._texts = await Texts.open(self.model_dir, self.config.chat_template, self._open_prompts, self.aside)
            self.form = await asyncio.to_thread(answer_form, self._texts.tokenizer, self.model_dir, self.config)
            self._begun = True
        except UserError as error:
            self._tokenizer_error = str(error)
        except Exception:
            logger.exception("cannot load the tokenizer")
            self._tokenizer_error = "cannot load the tokenizer; the server's log says more"

    def close(self) -> None:
        """End the helper processes of this one. Blocks for a moment."""
        self.following.close()
        self.aside.close()
        exporter, self.metrics.exporter = self.metrics.exporter, None
        if exporter is not None:
            exporter.close()
        if self._texts is not None:
            self._texts.close()

    @property
    def running(self) -> int:
        """Number of all running requests."""
        return len(self.requests) + len(self.following)

    def check_health(self) -> None:
        """Raises NotReadyError where this process can never serve, and another one may."""
        if self._tokenizer_error is not None:
            raise NotReadyError(self._tokenizer_error)

    async def readiness(self) -> Readiness:
        if self._tokenizer_error is not None:
            return Readiness(ready=False, reason="failed", error=self._tokenizer_error)
        if self.draining:
            return Readiness(ready=False, reason="it is shutting down: ask again in some seconds")
        state = await self.backend.readiness()
        if state.ready and not self._begun:
            return Readiness(ready=False, reason="loading the tokenizer")
        return state

    async def settings(self) -> dict[str, Any]:
        """What is in force, for people to read: keys are masked. Raises NotReadyError while the cluster is silent."""
        view = await self.backend.ask(Coordinator.config)
        return {
            "generation": view.generation,
            "model_name": self.model_name,
            "model_dir": view.model_dir,
            "device": view.device,
            "settings": in_force(self.config, view.config),
        }

    async def accept(self, request: Request) -> None:
        """From now on `request` counts as running, until its response has been sent whole.

        Raises NotReadyError, with the reason, where no worker has served yet, or none will; then it does not count.
        While workers recover, a request is accepted, and waits as those do that were accepted before.
        """
        # it counts from the moment at which it is not refused: a stop that comes during the wait below must know of it
        if not self.draining:
            self.requests.begin(request.scope)
        state = await self.readiness()
        may_wait = self.backend.can_wait and self._begun and not self.draining
        if not state.ready and (state.error is not None or not may_wait):
            self.requests.end(request.scope)
            raise NotReadyError(f"the server cannot serve: {state.error or state.reason}")

    @property
    def texts(self) -> Texts:
        """Raises NotReadyError before `begin` has ended, and where it failed."""
        if self._texts is None or not self._begun:
            raise NotReadyError(f"the server cannot serve: {self._tokenizer_error or 'loading the tokenizer'}")
        return self._texts

    async def info(self) -> ModelInfo:
        while self._info is None:
            try:
                self._info = await self.backend.ask(Coordinator.model_info)
            except NotReadyError:
                if not self.backend.can_wait:
                    raise
                await asyncio.sleep(RETRY_S)
        return self._info

    async def max_model_len(self) -> int:
        """The most tokens that a request may have, prompt and answer together."""
        longest = (await self.info()).max_model_len
        return min(self.config.max_model_len or longest, longest)

    async def limits(self) -> Limits:
        info, longest = await self.info(), await self.max_model_len()
        ends = tuple(dict.fromkeys((*info.eos_token_ids, *self.texts.tokenizer.eos_token_ids)))
        return Limits(max_model_len=longest, vocab_size=info.vocab_size, eos_token_ids=ends)

    def check_model(self, name: str | None) -> None:
        """Raises RequestError 404 for another model. A request may leave the name out, since there is one model."""
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name[:200]!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    async def render_chat(
        self, messages: Sequence[Message], fields: TemplateFields, tools: Sequence[Mapping[str, Any]] = ()
    ) -> str:
        """The prompt of a chat. Raises RequestError where the template refuses the messages, or does not end."""
        return await self.texts.prompts.render_chat(
            [message.to_template() for message in messages],
            add_generation_prompt=fields.begins_turn,
            continue_final_message=bool(fields.continue_final_message),
            template_kwargs=fields.template_kwargs,
            tools=list(tools),
        )

    async def encode(self, text: str, *, add_special_tokens: bool, param: str, to_be_cut: bool = False) -> TokenIds:
        """The tokens of a prompt.

        Raises RequestError, before encoding, where the prompt is far too long for the model and will not be cut.
        """
        limits = await self.limits()
        fewest = self.texts.tokenizer.fewest_tokens(text)
        if fewest > limits.max_model_len and not to_be_cut:
            raise RequestError(
                f"{param}: at least {counted(fewest, 'token')}; this model's maximum context length is "
                f"{limits.max_model_len}",
                param=param,
                code="context_length_exceeded",
            )
        return await self.texts.encode(text, add_special_tokens=add_special_tokens, param=param)

    async def grammar(self, fields: StructuredFields) -> Grammar | None:
        """The grammar that the fields ask for, if any, checked. Raises RequestError, which names the field."""
        requested = requested_grammar(fields)
        if requested is None:
            return None
        return await self.checked_grammar(requested.grammar, param=requested.param)

    async def checked_grammar(self, grammar: Grammar, *, param: str) -> Grammar:
        """`grammar`, after it has been compiled once. Raises RequestError, which names `param`, where it cannot be."""
        await self._grammars.check(self.texts.prompts, grammar, param=param)
        return grammar

    async def answers(
        self, body: SamplingFields, prompts: Sequence[Prompt], *, response_id: str, client: str
    ) -> list[Answer]:
        """Make n answers for each prompt, in OpenAI's order of indices. Raises RequestError."""
        limits = await self.limits()
        if len(prompts) * body.num_choices > MAX_SEQUENCES:
            raise RequestError(f"n: at most {MAX_SEQUENCES} answers may be asked for at once", param="n")
        answers: list[Answer] = []
        for prompt in prompts:
            if not prompt.token_ids:
                raise RequestError(
                    f"{prompt.param}: expected at least one token, got an empty text", param=prompt.param
                )
            check_token_ids(prompt.token_ids, limits.vocab_size, prompt.param)
            token_ids = tuple(prompt.token_ids)
            for choice in range(body.num_choices):
                seed = seed_of_choice(prompt.params.seed, choice)
                request = GenerateRequest(
                    request_id=RequestId(f"{response_id}-{len(answers)}"),
                    prompt_token_ids=token_ids,
                    params=dataclasses.replace(prompt.params, seed=seed),
                    cache_salt=body.cache_salt or "",
                    eos_token_ids=self.texts.tokenizer.eos_token_ids,
                    client=client,
                    priority=body.priority or 0,
                )
                if len(answers) % ANSWERS_AT_ONCE == 0:
                    await asyncio.sleep(0)
                parser = prompt.new_parser() if prompt.new_parser is not None else None
                answers.append(
                    self._answer(body, request, limits, index=len(answers), parser=parser, markers=prompt.markers)
                )
        return answers

    def _answer(
        self,
        body: SamplingFields,
        request: GenerateRequest,
        limits: Limits,
        *,
        index: int,
        parser: AnswerParser | None,
        markers: Mapping[int, str],
    ) -> Answer:
        return Answer(
            index=index,
            request=request,
            tokenizer=self.texts.tokenizer,
            stops=body.stops,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            eos_token_ids=limits.eos_token_ids,
            return_token_ids=bool(body.return_token_ids),
            parser=parser,
            markers=markers,
            interval=self.config.stream_interval,
        )

    async def rendering(self, record: Record) -> Rendering:
        """A fresh rendering of a response: the same at every replica."""
        chat = parse(ChatCompletionRequest, {**record.chat, "messages": [{"role": "user", "content": ""}]})
        prompt = self.texts.tokenizer.decode(record.request.prompt_token_ids[-PROMPT_END:])
        plan = await tool_plan(self.form, self.texts.tokenizer, prompt, chat, asked=None, checked=_unchecked)
        chars = None if self.form.tools is None else self.form.tools.call_id_chars
        parser = None if plan.new_parser is None else plan.new_parser(call_ids(record.id, chars))
        answer = self._answer(chat, record.request, await self.limits(), index=0, parser=parser, markers=plan.markers)
        return Rendering(record, answer, self.texts.tokenizer)

    def check_room(self, client: str, body: SamplingFields, prompts: int = 1) -> None:
        """Raises RequestError 503 where so many requests wait that `run` would refuse this one."""
        self.places.check(client, prompts * body.num_choices)

    async def run(self, answers: Sequence[Answer], shortcut: Shortcut | None = None) -> AsyncGenerator[Delta, None]:
        """The deltas of `answers`, all of one client, as they come. Closing the generator aborts the rest.

        `shortcut`: of a single answer. Tokens that take it are in no delta.
        Raises RequestError 503 where too many requests wait.
        """
        taken = self.places.take(answers[0].request.client, len(answers))
        try:
            streams = [
                answer_deltas(
                    self.backend.engine, answer, self.metrics, began=lambda: taken.give_back(1), shortcut=shortcut
                )
                for answer in answers
            ]
            async with contextlib.aclosing(merged(streams)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            taken.give_back()


async def _unchecked(grammar: Grammar, *, param: str) -> Grammar:
    """A response that is rendered has passed its checks."""
    return grammar
