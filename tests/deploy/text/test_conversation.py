"""What templates get: judged by transformers' own rendering of the conversation that is meant."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_moe.cluster.errors import RequestError
from elastic_moe.deploy.text.conversation import TemplateForms, conversation
from elastic_moe.deploy.text.tokenizer import Tokenizer
from tests.deploy.fakes import make_tokenizer

DEMANDING = """
{%- if reasoning_effort is defined %}[{{ reasoning_effort }}]{% endif %}
{%- for m in messages %}
{%- if m.role not in ('system', 'user', 'assistant', 'tool') %}{{ raise_exception('unknown role') }}{% endif %}
{%- if m.tool_calls is defined %}<calls>
{%- for c in m.tool_calls %}{{ c.function.name }}
{%- for k, v in c.function.arguments | items %} {{ k }}={{ v }}{% endfor %}
{%- endfor %}</calls>
{%- else %}<{{ m.role }}>{{ m.content | trim }}{% endif %}
{%- endfor %}"""
IN_PARTS = """
{%- for m in messages %}<{{ m.role }}>
{%- if m.role == 'tool' %}{{ m.content + '' }}
{%- else %}{% for part in m.content or [] %}{{ part.text }}|{% endfor %}{% endif %}
{%- endfor %}"""
EITHER = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}list{% endif %}{% endfor %}"
KNOWS_DEVELOPERS = (
    "{% for m in messages %}{% if m.role == 'developer' %}!{% endif %}{{ m.role }}{{ m.content }}{% endfor %}"
)
PLAIN = TemplateForms(developer=False, in_parts=frozenset())


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    made = {}
    for name, text in {"demanding": DEMANDING, "parts": IN_PARTS, "either": EITHER, "dev": KNOWS_DEVELOPERS}.items():
        directory = tmp_path_factory.mktemp(name)
        make_tokenizer(directory, chat_template=text)
        made[name] = Tokenizer.load(str(directory))
    return made


def call(arguments: object, name: str = "f") -> dict[str, Any]:
    return {"id": "c1", "type": "function", "function": {"name": name, "arguments": arguments}}


def turn(role: str, content: object, **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ('{"city": "Rome", "n": 2}', {"city": "Rome", "n": 2}),
        ({"city": "Rome"}, {"city": "Rome"}),
        ("", {}),
        ("null", {}),
        (None, {}),
    ],
)
def test_arguments_of_calls_are_objects(tokenizers: dict[str, Tokenizer], given: object, meant: object) -> None:
    tokenizer = tokenizers["demanding"]
    before, after = turn("user", "hi"), turn("tool", "sunny", tool_call_id="c1")
    history = [before, turn("assistant", None, tool_calls=[call(given)]), after]
    expected = [before, {"role": "assistant", "tool_calls": [call(meant)]}, after]
    assert tokenizer.render_chat(history) == tokenizer.render(expected)


def test_arguments_that_are_no_object_stay_what_they_are() -> None:
    for given in ("{broken", "[1]", "5"):
        (made,) = conversation([turn("assistant", None, tool_calls=[call(given)])], PLAIN)
        assert made["tool_calls"] == [call(given)]
        assert made["content"] is None


@pytest.mark.parametrize("nothing", [[], None])
def test_no_calls_drop_no_turn(tokenizers: dict[str, Tokenizer], nothing: object) -> None:
    said = [turn("user", "hi"), turn("assistant", "kept", tool_calls=nothing, refusal=None, audio=None)]
    assert tokenizers["demanding"].render_chat(said) == "<user>hi<assistant>kept"


@pytest.mark.parametrize("calls", [5, "x", [5], [{}], [{"function": "f"}], [{"function": {"arguments": "{}"}}]])
def test_calls_that_are_none(calls: object) -> None:
    with pytest.raises(RequestError, match=r"messages\.1\.tool_calls") as caught:
        conversation([turn("user", "x"), turn("assistant", None, tool_calls=calls)], PLAIN)
    assert str(caught.value.param).startswith("messages.1.tool_calls")


def test_developers_are_system_where_the_template_does_not_know_them(tokenizers: dict[str, Tokenizer]) -> None:
    said = [turn("developer", "be brief"), turn("user", "hi")]
    assert tokenizers["demanding"].render_chat(said) == "<system>be brief<user>hi"
    assert tokenizers["dev"].render_chat(said) == "!developerbe briefuserhi"


def test_variables_reach_the_template(tokenizers: dict[str, Tokenizer]) -> None:
    said = [turn("user", "hi")]
    assert tokenizers["demanding"].render_chat(said, template_kwargs={"reasoning_effort": "low"}) == "[low]<user>hi"
    with pytest.raises(RequestError, match="chat_template_kwargs: tokenize") as caught:
        tokenizers["demanding"].render_chat(said, template_kwargs={"tokenize": True})
    assert caught.value.param == "chat_template_kwargs"


def test_content_is_in_the_form_that_the_template_takes(tokenizers: dict[str, Tokenizer]) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    said = [turn("system", "s"), turn("user", parts), turn("assistant", "c"), turn("tool", parts)]
    assert tokenizers["parts"].template_forms.in_parts == {"system", "user", "assistant"}
    assert tokenizers["parts"].render_chat(said) == "<system>s|<user>a|b|<assistant>c|<tool>a\nb"
    assert tokenizers["demanding"].render_chat(said) == "<system>s<user>a\nb<assistant>c<tool>a\nb"
    assert tokenizers["either"].render_chat(said) == "sa\nbca\nb"


def test_a_message_to_continue(tokenizers: dict[str, Tokenizer]) -> None:
    said = [turn("user", "hi"), turn("assistant", "well,")]
    how = {"add_generation_prompt": False, "continue_final_message": True}
    assert tokenizers["parts"].render_chat(said, **how) == "<user>hi|<assistant>well,"
    assert tokenizers["demanding"].render_chat(said, **how) == "<user>hi<assistant>well,"


def test_a_plain_conversation_goes_through_as_it_is() -> None:
    said = [turn("user", "hi", name="bob"), turn("assistant", "x", reasoning_content="why")]
    assert conversation(said, PLAIN) == said


def test_reasoning_has_the_name_that_the_template_reads() -> None:
    """vLLM's answers call it `reasoning`, and clients send back what they got."""
    (made,) = conversation([turn("assistant", "x", reasoning="why")], PLAIN)
    assert made["reasoning_content"] == "why"
    harmony = TemplateForms(developer=True, in_parts=frozenset(), thinking=True)
    (made,) = conversation([turn("assistant", None, reasoning="why", tool_calls=[call("{}")])], harmony)
    assert made["thinking"] == "why"
    (made,) = conversation([turn("assistant", "x", reasoning="why")], harmony)
    assert "thinking" not in made
