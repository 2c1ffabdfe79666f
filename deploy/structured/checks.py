"""Compiles each grammar once before a request with it is accepted, and remembers what came of it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.grammars import Grammar
from elastic_moe.deploy.text.prompts import Prompts

MAX_CHECKED = 1024


class GrammarChecks:
    """The verdicts on the latest grammars. Use it on one event loop."""

    def __init__(self) -> None:
        self._verdicts: OrderedDict[bytes, str | None] = OrderedDict()
        """By digest: what is wrong with a grammar, None for a good one."""

    async def check(self, prompts: Prompts, grammar: Grammar, *, param: str) -> None:
        """Raises RequestError, which names `param`, for a grammar that cannot be compiled within the limits."""
        key = hashlib.blake2b(f"{grammar.kind} {grammar.text}".encode(errors="surrogatepass"), digest_size=16).digest()
        if key not in self._verdicts:
            self._verdicts[key] = await prompts.fault_of_grammar(grammar)
            if len(self._verdicts) > MAX_CHECKED:
                self._verdicts.popitem(last=False)
        self._verdicts.move_to_end(key)
        if fault := self._verdicts[key]:
            raise RequestError(f"{param}: {fault}", param=param, code="invalid_value")
