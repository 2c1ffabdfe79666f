"""Templates and tokenizers of strangers: what loops or grows ends with one line, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from elastic_moe.actors import stillness
from elastic_moe.cluster.config import ServeConfig
from elastic_moe.cluster.errors import CheckpointError, ConfigError, NotReadyError, RequestError, UserError
from elastic_moe.cluster.messages.grammars import Grammar, GrammarKind
from elastic_moe.deploy.api.service import Service
from elastic_moe.deploy.text.prompts import BoundedPrompts
from elastic_moe.deploy.text.tokenizer import Tokenizer
from elastic_moe.deploy.text.tokenizer_process import TokenizerProcess
from tests.deploy.fakes import FakeBackend, make_tokenizer

pytestmark = pytest.mark.slow

LOOP = "{% for a in range(90000) %}{% for b in range(90000) %}{{ '' }}{% endfor %}{% endfor %}"
GROW = "{{ ('x' * 2000000000) | length }}"
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'loop' %}" + LOOP + "{% elif m.content == 'grow' %}"
    "{% set ns = namespace(text='x') %}{% for n in range(40) %}{% set ns.text = ns.text + ns.text %}{% endfor %}"
    "{% else %}<|im|>{{ m.role }}\n{{ m.content }}\n{% endif %}{% endfor %}"
)
EXPLODES = {"type": "Split", "pattern": {"Regex": "(z+z+z+)+q|(z|z)+$"}, "behavior": "Isolated", "invert": False}


def user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def edit(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@asynccontextmanager
async def opened(model_dir: Path) -> AsyncGenerator[BoundedPrompts, None]:
    prompts = await BoundedPrompts.open(str(model_dir), None)
    try:
        yield prompts
    finally:
        prompts.close()


async def refusal(call: Awaitable[object]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        await call
    return caught.value


def test_prompts_are_as_the_tokenizer_makes_them_and_hostile_ones_end(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat_template=TEMPLATE)
    edit(tmp_path / "tokenizer.json", lambda content: content.update(pre_tokenizer=with_explosion(content)))
    tokenizer = Tokenizer.load(str(tmp_path))
    text = "hello 日本 \ud7ff\u2028" * 3000

    async def work() -> None:
        async with opened(tmp_path) as prompts:
            assert await prompts.render_chat(user("hi"), template_kwargs={}) == tokenizer.render_chat(user("hi"))
            for special in (True, False):
                tokens = await prompts.encode(text, add_special_tokens=special, param="prompt")
                assert tokens == tokenizer.encode(text, add_special_tokens=special)
            # what loops takes nothing from what comes beside it
            looping = asyncio.create_task(refusal(prompts.render_chat(user("loop"))))
            for _ in range(100):
                await prompts.encode("hello", add_special_tokens=True, param="prompt")
            assert not looping.done()
            for error, param in (
                (await looping, "messages"),
                (await refusal(prompts.render_chat(user("grow"))), "messages"),
                (await refusal(prompts.encode("z" * 60 + "!", add_special_tokens=True, param="prompt")), "prompt"),
            ):
                assert error.param == param
                assert str(error).startswith(f"{param}: the ")
            refused = await refusal(prompts.render_chat([{"role": "user", "content": None, "tool_calls": 5}]))
            assert (refused.param, refused.code) == ("messages.0.tool_calls", "invalid_type")
            # and all goes on as before
            assert await prompts.encode("hello", add_special_tokens=True, param="prompt") == tokenizer.encode("hello")

    asyncio.run(work())


def with_explosion(content: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [EXPLODES, content["pre_tokenizer"]]}


def test_a_dead_process_is_replaced_and_none_is_left_at_the_end(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    before = set(psutil.Process().children(recursive=True))

    def processes() -> list[psutil.Process]:
        return [child for child in psutil.Process().children(recursive=True) if child not in before]

    async def work() -> list[psutil.Process]:
        async with opened(tmp_path) as prompts:
            first = await prompts.encode("hello", add_special_tokens=True, param="prompt")
            for process in processes():
                os.kill(process.pid, signal.SIGKILL)
            psutil.wait_procs(processes(), timeout=10)
            await asyncio.sleep(0.05)
            assert await prompts.encode("hello", add_special_tokens=True, param="prompt") == first
            return processes()

    children = asyncio.run(work())
    assert len(children) == 2
    assert not psutil.wait_procs(children, timeout=10)[1]


@pytest.mark.parametrize("role", ["workers", "the process that forks them", "all"])
def test_a_stopped_process_is_replaced_and_its_requests_are_done_again(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stillness, "STOPPED_S", 0.5)
    make_tokenizer(tmp_path)
    before = set(psutil.Process().children(recursive=True))
    long = "hello " * 20000

    async def work() -> None:
        async with opened(tmp_path) as prompts, asyncio.timeout(60):

            def encode(text: str) -> Awaitable[list[int]]:
                return prompts.encode(text, add_special_tokens=True, param="prompt")

            texts = ["hello", "world", long, "a", "b", long]
            first = await asyncio.gather(*map(encode, texts))
            forking = [child for child in psutil.Process().children() if child not in before]
            workers = [child for process in forking for child in process.children()]
            stopped = {"workers": workers, "all": [*forking, *workers]}.get(role, forking)
            for process in stopped:
                process.suspend()
            # with all seats, so that others are forked: the long text's process is not used again
            grammar = prompts.fault_of_grammar(Grammar(kind=GrammarKind.REGEX, text="a+"))
            *again, fault = await asyncio.gather(*map(encode, texts), grammar)
            assert again == first
            assert fault is None
            assert psutil.wait_procs(stopped, timeout=0)[0], "it is ended, and goes on at no time"

    asyncio.run(work())
    assert not psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=10)[1]


def test_where_all_processes_are_stopped_again_and_again_a_request_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stillness, "STOPPED_S", 0.5)
    make_tokenizer(tmp_path)
    before = set(psutil.Process().children(recursive=True))

    async def stop() -> None:
        while True:
            for child in set(psutil.Process().children(recursive=True)) - before:
                with contextlib.suppress(psutil.Error):
                    # one that is not another Python yet is waited for by its parent
                    if "tokenizer_process" in " ".join(child.cmdline()):
                        child.suspend()
            await asyncio.sleep(0.005)

    async def work() -> None:
        async with opened(tmp_path) as prompts, asyncio.timeout(60):
            stopping = asyncio.create_task(stop())
            await asyncio.sleep(0.05)
            with pytest.raises(NotReadyError, match="the tokenizer's process does not start"):
                await prompts.encode("hello", add_special_tokens=True, param="prompt")
            stopping.cancel()
            assert await prompts.encode("hello", add_special_tokens=True, param="prompt")

    asyncio.run(work())


def test_a_process_that_is_stopped_while_it_starts_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stillness, "STOPPED_S", 0.5)
    make_tokenizer(tmp_path)
    with TokenizerProcess(str(tmp_path), None) as process:
        stopped = process._process
        os.kill(stopped.pid, signal.SIGSTOP)
        process.wait()
        assert stopped.returncode == -signal.SIGKILL
        process.worker().close()


def test_a_request_whose_process_is_killed_is_done_again(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    before = set(psutil.Process().children(recursive=True))

    async def work() -> None:
        async with opened(tmp_path) as prompts:
            first = await prompts.encode("hello", add_special_tokens=True, param="prompt")
            [worker] = [
                child
                for process in psutil.Process().children()
                if process not in before
                for child in process.children()
            ]
            worker.suspend()
            again = asyncio.create_task(prompts.encode("hello", add_special_tokens=True, param="prompt"))
            await asyncio.sleep(0.05)
            worker.kill()
            assert await again == first

    asyncio.run(work())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda directory: template(directory, LOOP), "the chat template renders not even a short conversation within"),
        (lambda directory: template(directory, GROW), "the chat template renders not even a short conversation within"),
        (lambda directory: splits(directory, "(a|a)+$|((a+)+)+q"), "the tokenizer"),
        (lambda directory: splits(directory, "(("), "cannot load the tokenizer"),
    ],
    ids=["loops", "grows", "explodes", "no-expression"],
)
def test_what_cannot_be_used_is_found_before_it_is_served(
    tmp_path: Path, change: Callable[[Path], None], words: str
) -> None:
    make_tokenizer(tmp_path)
    change(tmp_path)
    with TokenizerProcess(str(tmp_path), None) as process, pytest.raises(CheckpointError, match=words) as caught:
        process.wait()
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)


def template(directory: Path, text: str) -> None:
    edit(directory / "tokenizer_config.json", lambda content: content.update(chat_template=text))


def splits(directory: Path, expression: str) -> None:
    split = {**EXPLODES, "pattern": {"Regex": expression}}
    edit(directory / "tokenizer.json", lambda content: content.update(pre_tokenizer=split))


def test_a_template_of_the_users_that_is_none(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    mine = str(tmp_path / "mine.jinja")
    with TokenizerProcess(str(tmp_path), mine) as process, pytest.raises(ConfigError, match=r"mine\.jinja: line 2"):
        process.wait()


def test_a_service_says_why_it_has_no_tokenizer(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, chat_template=LOOP)

    async def work() -> str | None:
        service = Service(ServeConfig(), FakeBackend(), str(tmp_path), BoundedPrompts.open)
        await service.begin()
        return (await service.readiness()).error

    assert "chat template" in (asyncio.run(work()) or "")
    assert issubclass(CheckpointError, UserError)


def test_grammars_are_compiled_within_limits(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    # some thousands of alternatives take seconds
    alternatives = " | ".join(f'"{n}" %json {{"type": "object", "properties": {{"a{n}": {{}}}}}}' for n in range(2500))

    async def work() -> None:
        async with opened(tmp_path) as prompts:
            assert await prompts.fault_of_grammar(Grammar(kind=GrammarKind.REGEX, text="a+")) is None
            assert "unclosed group" in str(await prompts.fault_of_grammar(Grammar(kind=GrammarKind.REGEX, text="(")))
            hostile = Grammar(kind=GrammarKind.EBNF, text=f"start: {alternatives}")
            working = asyncio.create_task(prompts.fault_of_grammar(hostile))
            # it takes nothing from what comes beside it
            for _ in range(20):
                await prompts.encode("hello", add_special_tokens=True, param="prompt")
            assert await working is not None
            assert await prompts.fault_of_grammar(Grammar(kind=GrammarKind.REGEX, text="a+")) is None

    asyncio.run(work())
