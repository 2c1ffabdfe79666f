"""What every handler needs: the backend, the tokenizer, limits and defaults of the model, and whether to serve at all."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from importlib import metadata
from pathlib import Path

from cluster.config import ServeConfig
from cluster.errors import NotReadyError, RequestError, UserError
from cluster.protocol import GenerateRequest, ModelInfo, Readiness, RequestId, SamplingParams
from deploy.backend import Backend
from deploy.generation import Answer, Delta, answer_deltas, merged
from deploy.metrics import Metrics
from deploy.sampling import Limits, SamplingDefaults, check_token_ids, seed_of_choice
from deploy.schema import SamplingFields
from deploy.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 1024
"""Prompts times n of one request."""
LONG_TEXT = 4096
"""Characters from which on a text is encoded in a thread, so that streams do not stall."""


def version() -> str:
    return metadata.version("elastic-moe")


class Service:
    """One per replica. `begin` loads the tokenizer in the background; until it is there, nothing is ready."""

    def __init__(self, config: ServeConfig, backend: Backend, model_dir: str) -> None:
        self.config = config
        self.backend = backend
        self.model_dir = model_dir
        self.model_name = config.served_model_name or Path(model_dir).resolve().name
        self.metrics = Metrics(self.model_name)
        self.created = int(time.time())
        self.draining = False
        """Told to stop: requests under way go on, new ones are refused."""
        self.active = 0
        """Requests under way."""
        digest = hashlib.blake2b(f"{version()} {self.model_name} {config.dtype}".encode(), digest_size=5).hexdigest()
        self.fingerprint = f"emoe-{version()}-{digest}"
        self.defaults = SamplingDefaults()
        self._tokenizer: Tokenizer | None = None
        self._tokenizer_error: str | None = None
        self._info: ModelInfo | None = None

    async def begin(self) -> None:
        try:
            self.defaults = SamplingDefaults.read(self.model_dir)
            self._tokenizer = await asyncio.to_thread(Tokenizer.load, self.model_dir, self.config.chat_template)
        except UserError as error:
            self._tokenizer_error = str(error)
        except Exception:
            logger.exception("cannot load the tokenizer")
            self._tokenizer_error = "cannot load the tokenizer; the server's log says more"

    async def readiness(self) -> Readiness:
        if self._tokenizer_error is not None:
            return Readiness(ready=False, reason="failed", error=self._tokenizer_error)
        if self.draining:
            return Readiness(ready=False, reason="shutting down")
        state = await self.backend.readiness()
        if state.ready and self._tokenizer is None:
            return Readiness(ready=False, reason="loading the tokenizer")
        return state

    async def check_ready(self) -> None:
        """Raises NotReadyError with the reason."""
        state = await self.readiness()
        if not state.ready:
            raise NotReadyError(f"the server cannot serve: {state.error or state.reason}")

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise NotReadyError(f"the server cannot serve: {self._tokenizer_error or 'loading the tokenizer'}")
        return self._tokenizer

    async def info(self) -> ModelInfo:
        if self._info is None:
            self._info = await self.backend.model_info()
        return self._info

    async def limits(self) -> Limits:
        info = await self.info()
        longest = min(self.config.max_model_len or info.max_model_len, info.max_model_len)
        return Limits(max_model_len=longest, vocab_size=info.vocab_size)

    def check_model(self, name: str | None) -> None:
        """Raises RequestError 404. A request may leave the name out: there is one model."""
        if name is not None and name != self.model_name:
            raise RequestError(
                f"the model {name[:200]!r} does not exist; this server has {self.model_name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    async def encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        limits = await self.limits()
        fewest = self.tokenizer.fewest_tokens(text)
        if fewest > limits.max_model_len:
            raise RequestError(
                f"{param}: at least {fewest} tokens; this model's maximum context length is {limits.max_model_len}",
                param=param,
                code="context_length_exceeded",
            )
        if len(text) < LONG_TEXT:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)

    async def answers(
        self, body: SamplingFields, prompts: Sequence[tuple[list[int], SamplingParams]], *, param: str, prefix: str
    ) -> tuple[str, list[Answer]]:
        """The response's id, and n answers for each prompt, in OpenAI's order of indices."""
        limits, info = await self.limits(), await self.info()
        if len(prompts) * body.num_choices > MAX_SEQUENCES:
            raise RequestError(f"n: at most {MAX_SEQUENCES} answers may be asked for at once", param="n")
        response_id = f"{prefix}-{uuid.uuid4().hex}"
        answers: list[Answer] = []
        for prompt, params in prompts:
            if not prompt:
                raise RequestError(f"{param}: expected at least one token", param=param)
            check_token_ids(prompt, limits.vocab_size, param)
            for choice in range(body.num_choices):
                answers.append(self._answer(body, prompt, params, choice, len(answers), response_id, info))
        return response_id, answers

    def _answer(
        self,
        body: SamplingFields,
        prompt: list[int],
        params: SamplingParams,
        choice: int,
        index: int,
        response_id: str,
        info: ModelInfo,
    ) -> Answer:
        name = RequestId(f"{response_id}-{index}")
        seeded = params if choice == 0 else dataclasses.replace(params, seed=seed_of_choice(params.seed, choice))
        return Answer(
            index=index,
            request=GenerateRequest(request_id=name, prompt_token_ids=tuple(prompt), params=seeded),
            tokenizer=self.tokenizer,
            stops=body.stops,
            include_stop=bool(body.include_stop_str_in_output),
            skip_special_tokens=body.skip_special_tokens is not False,
            eos_token_ids=info.eos_token_ids,
        )

    async def run(self, answers: Sequence[Answer]) -> AsyncGenerator[Delta, None]:
        """Deltas of all `answers` as they come. Closing it aborts what is left."""
        self.active += 1
        try:
            streams = [answer_deltas(self.backend, answer, self.metrics) for answer in answers]
            async with contextlib.aclosing(merged(streams)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self.active -= 1
