"""How one chat uses tools: what its answers are parsed by, and what grammar they must follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from elastic_moe.cluster.errors import RequestError
from elastic_moe.cluster.messages.grammars import Grammar
from elastic_moe.cluster.messages.requests import ThinkingBudget
from elastic_moe.deploy.bodies.tools import ToolFields
from elastic_moe.deploy.parsing.formats import LIST_OF_CALLS, AnswerForm, family_called
from elastic_moe.deploy.parsing.grammars import Thinking, answer_grammar, schema_grammar, thinking_of, writes_calls
from elastic_moe.deploy.parsing.parser import AnswerParser, begun_answer
from elastic_moe.deploy.text.tokenizer import Tokenizer

Tools = Sequence[Mapping[str, Any]]


class Check(Protocol):
    async def __call__(self, grammar: Grammar, *, param: str) -> Grammar:
        """The grammar, after it has been compiled. Raises RequestError, which names `param`."""
        ...


class NewParser(Protocol):
    def __call__(self, new_id: Callable[[], str] | None = None) -> AnswerParser:
        """A parser of one answer. `new_id` makes the ids of its calls where the model writes none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolPlan:
    new_parser: NewParser | None
    """Makes the parser of an answer. None: there is nothing to parse."""
    markers: Mapping[int, str]
    """The special tokens that the parser must see, with their texts."""
    grammar: Grammar | None = None
    grammar_after: tuple[int, ...] | None = None
    """`grammar` and `grammar_after` as in SamplingParams."""


async def tool_plan(
    form: AnswerForm, tokenizer: Tokenizer, prompt: str, fields: ToolFields, *, asked: Grammar | None, checked: Check
) -> ToolPlan:
    """The plan of a request with this prompt. Raises RequestError where a tool's schema cannot be made a grammar.

    `asked` is the grammar that the request's other fields ask for. It is for the answer itself: the model may think
    before it, and may call tools instead. A tool that must be called leaves no place for it.
    """
    tools: Tools = fields.callable_tools
    if fields.must_call:
        tools = [tool for tool in tools if fields.named_tool in (None, tool["function"]["name"])]
        # how calls are to be written is known of families only
        form = dataclasses.replace(
            form, own=None, tools=form.tools if writes_calls(form) else family_called(LIST_OF_CALLS)
        )
    tools = tools if form.has_tools else ()
    one_call = fields.parallel_tool_calls is False or fields.named_tool is not None
    begun = begun_answer(form, prompt)
    new_parser = _parsers(form, begun, tools, 1 if one_call else None)
    plan = ToolPlan(new_parser=new_parser, markers=form.markers(tokenizer.special_tokens, tools=bool(tools)))
    if asked is None and not fields.must_call:
        return plan
    in_reasoning = new_parser is not None and new_parser().in_reasoning
    thinking = thinking_of(form, begun, in_reasoning=in_reasoning)
    after = None
    if not fields.must_call:
        tools = tools if writes_calls(form) else ()
        after = _end_of_reasoning(tokenizer, thinking)
        if not tools and (thinking is None or (thinking.open and after is not None)):
            return dataclasses.replace(plan, grammar=asked, grammar_after=after)
    for tool in tools:
        await checked(schema_grammar(tool["function"]), param=_parameters_of(fields, tool))
    special = {text: token_id for token_id, text in tokenizer.special_tokens.items() if text}
    grammar = answer_grammar(
        form,
        special,
        content=None if fields.must_call else asked,
        tools=tools,
        one_call=one_call,
        thinking=thinking,
    )
    if grammar is None:
        return dataclasses.replace(plan, grammar=asked, grammar_after=after)
    return dataclasses.replace(plan, grammar=await checked(grammar, param="tools" if tools else "response_format"))


def thinking_budget(form: AnswerForm, tokenizer: Tokenizer, prompt: str, tokens: int | None) -> ThinkingBudget | None:
    """The bound of the reasoning after `prompt`; None where there is none to bound.

    Raises RequestError where a bound is asked for, and the model's reasoning cannot be told apart.
    """
    if tokens is None:
        return None
    if not form.has_reasoning or form.template(tools=False) is None:
        raise RequestError(
            "thinking_token_budget: this server does not know how the model marks its reasoning; start it with "
            "--reasoning-parser",
            param="thinking_token_budget",
            code="unsupported_parameter",
        )
    begun = begun_answer(form, prompt)
    parser = AnswerParser(form, begun=begun, tools=(), max_calls=None)
    thinking = thinking_of(form, begun, in_reasoning=parser.in_reasoning)
    if thinking is None:
        return None
    start, end = (_tokens(tokenizer, mark) for mark in thinking.marks)
    return ThinkingBudget(tokens=tokens, end=end, start=() if thinking.open else start)


def _tokens(tokenizer: Tokenizer, mark: str) -> tuple[int, ...]:
    token_id = tokenizer.id_of_piece(mark)
    return tuple(tokenizer.encode(mark, add_special_tokens=False)) if token_id is None else (token_id,)


def _parsers(form: AnswerForm, begun: str, tools: Tools, max_calls: int | None) -> NewParser | None:
    if form.template(tools=bool(tools)) is None:
        return None

    def new_parser(new_id: Callable[[], str] | None = None) -> AnswerParser:
        return AnswerParser(form, begun=begun, tools=tools, max_calls=max_calls, new_id=new_id)

    return new_parser


def _end_of_reasoning(tokenizer: Tokenizer, thinking: Thinking | None) -> tuple[int, ...] | None:
    """The token that ends the reasoning; None where it takes several, since they may be cut in many ways."""
    token_id = tokenizer.id_of_piece(thinking.marks[1]) if thinking is not None and not thinking.answer else None
    return None if token_id is None else (token_id,)


def _parameters_of(fields: ToolFields, tool: Mapping[str, Any]) -> str:
    names = [one.function.name for one in fields.tools or ()]
    return f"tools.{names.index(tool['function']['name'])}.function.parameters"
