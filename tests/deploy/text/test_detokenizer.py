"""Text handling: the same text however tokens are cut into chunks, and nothing shown too early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from elastic_moe.cluster.messages.requests import FinishReason, GenerateRequest, RequestId, SamplingParams, TokenOutput
from elastic_moe.deploy.generation.answer import Answer
from elastic_moe.deploy.text.byte_detokenizer import ByteDetokenizer
from elastic_moe.deploy.text.detokenizer import REPLACEMENT, Detokenizer, StopStrings
from elastic_moe.deploy.text.tokenizer import Tokenizer
from tests.deploy.fakes import make_sentencepiece_tokenizer, make_tokenizer

Decode = Callable[[Sequence[int]], str]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> RustTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("byte-level"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer(directory)
    return Tokenizer.load(str(directory))


@pytest.fixture(scope="module")
def byte_fallback() -> RustTokenizer:
    """Like SentencePiece models: spaces as U+2581, unknown characters as bytes, the first space is dropped."""
    words = ["▁hello", "▁world", "hel", "lo", "▁", "😀", "é"]
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {word: len(vocab) + n for n, word in enumerate(words)}
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


def decoder(tokenizer: RustTokenizer) -> Decode:
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def stream(decode: Decode, tokens: Sequence[int], prompt: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(decode, prompt)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(tokens=st.lists(st.integers(0, 329), max_size=40))
def test_the_stream_is_the_text_of_all_tokens(byte_level: RustTokenizer, tokens: list[int]) -> None:
    decode = decoder(byte_level)
    assert "".join(stream(decode, tokens)) == decode(tokens)


@settings(max_examples=300, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 329), max_size=6),
    tokens=st.lists(st.integers(0, 332), max_size=40),
    skip=st.booleans(),
    texts=st.lists(st.text(max_size=4), max_size=4),
)
def test_a_table_of_bytes_says_the_same(
    model: Tokenizer, prompt: list[int], tokens: list[int], skip: bool, texts: list[str]
) -> None:
    tokens += chain(*map(model.encode, texts))
    detokenizer = model.detokenizer(prompt, skip_special_tokens=skip)
    pieces = [*map(detokenizer.push, tokens), detokenizer.flush()]
    whole = model.decode(tokens, skip_special_tokens=skip)
    if isinstance(detokenizer, ByteDetokenizer):
        assert "".join(pieces) == whole
        # nothing is held back but the beginning of a character
        for end in range(len(tokens)):
            text = model.decode(tokens[: end + 1], skip_special_tokens=skip)
            assert text.startswith("".join(pieces[: end + 1]))
            assert text.rstrip(REPLACEMENT).startswith("".join(pieces[: end + 1]).rstrip(REPLACEMENT))
    else:
        assert model.decode(prompt[-4:], skip_special_tokens=skip).endswith(REPLACEMENT)


def test_only_vocabularies_of_bytes_have_a_table(model: Tokenizer, tmp_path: Path) -> None:
    assert isinstance(model.detokenizer((), skip_special_tokens=True), ByteDetokenizer)
    half = model.encode("😀")[:1]
    assert isinstance(model.detokenizer(half, skip_special_tokens=True), Detokenizer)
    make_sentencepiece_tokenizer(tmp_path)
    assert isinstance(Tokenizer.load(str(tmp_path)).detokenizer((), skip_special_tokens=True), Detokenizer)


@settings(max_examples=300, deadline=None)
@given(parts=st.lists(st.one_of(st.integers(257, 263), st.text(max_size=3)), max_size=12), data=st.data())
def test_spaces_and_bytes_of_sentencepiece_models(
    byte_fallback: RustTokenizer, parts: list[int | str], data: st.DataObject
) -> None:
    decode = decoder(byte_fallback)
    # texts become single bytes; a word first, because a leading space is dropped
    lists = [[p] if isinstance(p, int) else [b + 1 for b in p.replace(REPLACEMENT, "").encode()] for p in parts]
    split = data.draw(st.integers(0, len(lists)))
    prompt, tokens = [257, *chain(*lists[:split])], [*chain(*lists[split:])]
    pieces = stream(decode, tokens, prompt)
    assert decode(prompt) + "".join(pieces) == decode([*prompt, *tokens])
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_the_window_never_begins_within_a_character(byte_fallback: RustTokenizer) -> None:
    """The thirteenth token is a space, which is no text by itself; before it are bytes of one character."""
    decode = decoder(byte_fallback)
    tokens = [257, 257, *(byte + 1 for byte in "\x80\u0800\U00010000 0".encode())]
    assert decode([257]) + "".join(stream(decode, tokens, [257])) == decode([257, *tokens])


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=20))
def test_no_piece_of_a_character_is_shown(byte_level: RustTokenizer, text: str) -> None:
    text = text.replace(REPLACEMENT, "")
    tokens = byte_level.encode(text).ids
    pieces = stream(decoder(byte_level), tokens)
    assert "".join(pieces) == text
    assert not any(REPLACEMENT in piece for piece in pieces)


def test_an_unfinished_character_is_shown_at_the_end(byte_level: RustTokenizer) -> None:
    first = byte_level.encode("😀").ids[0]
    assert stream(decoder(byte_level), [first]) == ["", REPLACEMENT]


@settings(max_examples=200, deadline=None)
@given(tokens=st.lists(st.sampled_from([257, 258, 264, 264]), max_size=60))
def test_a_skipped_token_takes_no_space_along(byte_fallback: RustTokenizer, tokens: list[int]) -> None:
    decode = decoder(byte_fallback)
    assert decode([257]) + "".join(stream(decode, tokens, [257])) == decode([257, *tokens])


def test_skipped_tokens_do_not_pile_up(byte_fallback: RustTokenizer) -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return str(byte_fallback.decode(list(ids), skip_special_tokens=True))

    assert "".join(stream(decode, [258, *[264] * 1000, 258], [257])) == " world world"
    assert longest < 50


def test_bytes_that_never_become_text_do_not_pile_up() -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return bytes(ids).decode("utf-8", errors="replace")

    assert len("".join(stream(decode, [0xF0] * 1000))) == 1000
    assert longest < 100


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_a_run_of_any_token_takes_linear_time(kind: str, request: pytest.FixtureRequest) -> None:
    """Such as SentencePiece's space token, which has no text by itself."""
    tokenizer: RustTokenizer = request.getfixturevalue(kind)
    decoded = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(ids)
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))

    word = tokenizer.token_to_id("▁hello") or tokenizer.token_to_id("h")
    assert word is not None
    length = 300
    for token in range(tokenizer.get_vocab_size()):
        decoded = 0
        text = "".join(stream(decode, [token] * length, [word]))
        assert decoded < 60 * length, (token, tokenizer.id_to_token(token))
        whole = decoder(tokenizer)([word, *[token] * length])
        assert decoder(tokenizer)([word]) + text == whole, tokenizer.id_to_token(token)


# --- Stop strings -----------------------------------------------------------------------------------------------

LETTERS = st.text(alphabet="ab", max_size=30)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3)


def cut(text: str, stops: Sequence[str], include: bool) -> str:
    """The text up to the first stop string, found letter by letter."""
    for end in range(len(text) + 1):
        found = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if found is not None:
            return text[: end if include else end - len(found)]
    return text


@settings(max_examples=500)
@given(text=LETTERS, stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 30), max_size=6))
def test_stop_strings_however_the_text_is_cut(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    scanner = StopStrings(stops, include=include)
    edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    shown = ""
    expected = cut(text, stops, include)
    for start, end in pairwise(edges):
        shown += scanner.push(text[start:end])
        assert expected.startswith(shown)
    if scanner.found is None:
        shown += scanner.flush()
    assert shown == expected


def test_only_what_may_be_a_stop_string_is_held_back() -> None:
    scanner = StopStrings(["STOP"])
    assert [scanner.push(text) for text in ("abc", "dST", "x", "ST", "OP", "more")] == ["abc", "d", "STx", "", "", ""]
    assert scanner.found == "STOP"


# --- Answers ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("answers")
    make_tokenizer(directory)
    return Tokenizer.load(str(directory))


def answer_of(tokenizer: Tokenizer, stops: Sequence[str] = (), **params: object) -> Answer:
    request = GenerateRequest(
        request_id=RequestId("r"), prompt_token_ids=(70,), params=SamplingParams(max_tokens=100, **params)
    )
    return Answer(index=0, request=request, tokenizer=tokenizer, stops=stops, eos_token_ids=(0,))


def outputs(tokens: Sequence[int], sizes: Sequence[int], reason: FinishReason) -> list[TokenOutput]:
    result, start, sizes = [], 0, [*sizes, len(tokens)]
    for size in sizes:
        part = tuple(tokens[start : start + max(1, size)])
        start += len(part)
        ends = start >= len(tokens)
        result.append(
            TokenOutput(
                request_id=RequestId("r"),
                offset=start - len(part),
                token_ids=part,
                finish_reason=reason if ends else None,
            )
        )
        if ends:
            break
    return result


@settings(max_examples=200, deadline=None)
@given(
    tokens=st.lists(st.integers(2, 329), min_size=1, max_size=25),
    sizes=st.lists(st.integers(1, 6), max_size=25),
    stops=st.lists(st.text(min_size=1, max_size=2), max_size=2),
)
def test_an_answer_does_not_depend_on_chunks(
    tokenizer: Tokenizer, tokens: list[int], sizes: list[int], stops: list[str]
) -> None:
    def run(sizes: Sequence[int]) -> tuple[str, int, object, object]:
        answer, text, last = answer_of(tokenizer, stops), "", None
        for output in outputs(tokens, sizes, FinishReason.LENGTH):
            last = answer.feed(output)
            text += last.text
            if answer.finished:
                break
        assert last is not None
        return text, answer.completion_tokens, last.finish_reason, last.stop_reason

    assert run(sizes) == run([1] * len(tokens)) == run([len(tokens)])


def test_a_stop_token_counts_and_is_not_shown(tokenizer: Tokenizer) -> None:
    answer = answer_of(tokenizer, stop_token_ids=(68,))
    output = TokenOutput(
        request_id=RequestId("r"),
        offset=0,
        token_ids=(66, 67, 68),
        finish_reason=FinishReason.STOP,
        stop_token_id=68,
    )
    delta = answer.feed(output)
    assert (delta.text, delta.stop_reason, answer.completion_tokens) == (tokenizer.decode([66, 67]), 68, 3)


def test_stop_strings_wait_for_min_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("aaaa")
    text = tokenizer.decode(tokens[:2])
    answer = answer_of(tokenizer, stops=["a"], min_tokens=2)
    deltas = [answer.feed(output) for output in outputs(tokens, [1] * len(tokens), FinishReason.LENGTH)]
    assert "".join(delta.text for delta in deltas[:3]) == text
    assert deltas[2].stop_reason == "a"


def test_bytes_of_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀é a")
    assert b"".join(tokenizer.token_bytes(token) for token in ids).decode() == "😀é a"


def test_encoding_comes_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.decode(tokenizer.encode("naïve 日本語 hello")) == "naïve 日本語 hello"
    assert tokenizer.fewest_tokens("a" * 1000) > 0
