"""Streaming: only whole characters, each once, and joined the same as the whole."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_tokenizers import FOLDERS, HARD, any_text, corpus, sentencepiece_model
from ratoon.text.stream import UNFINISHED, StreamDecoder
from ratoon.text.tokenizer import Tokenizer

quick = settings(max_examples=100, deadline=None)
KINDS = ["ours", "bytes", *FOLDERS, "sp-unigram", "sp-bpe", "sp-no-prefix"]


@cache
def _made(kind: str, folder: Path) -> Tokenizer:
    if kind == "ours":
        return Tokenizer.train(corpus(), vocab_size=700)
    if kind == "bytes":
        return Tokenizer.bytes_only()
    if kind in FOLDERS:
        return Tokenizer.load(FOLDERS[kind](folder / kind))
    (folder / kind).mkdir()
    options = {
        "sp-unigram": {"kind": "unigram", "byte_fallback": True},
        "sp-bpe": {"kind": "bpe", "byte_fallback": True},
        "sp-no-prefix": {"kind": "bpe", "byte_fallback": True, "add_dummy_prefix": False},
    }[kind]
    (folder / kind / "tokenizer.model").write_bytes(sentencepiece_model(**options))  # type: ignore[arg-type]
    return Tokenizer.load(folder / kind)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return _made(request.param, tmp_path_factory.mktemp("stream"))


def check(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> None:
    """What is given out is the text of the whole, and at every moment a beginning of it."""
    decoder = StreamDecoder(tokenizer, skip_special)
    whole, given_out = tokenizer.decode(ids, skip_special), ""
    for token in ids:
        new = decoder.push(token)
        given_out += new
        assert whole.startswith(given_out)
    given_out += decoder.flush()
    assert given_out == whole
    assert decoder.flush() == ""
    again = "".join(decoder.push(token) for token in ids) + decoder.flush()
    assert again == whole, "the decoder is as new after the end"


def test_a_text_streams_as_itself(tokenizer: Tokenizer) -> None:
    @quick
    @given(any_text)
    def any_of_them(text: str) -> None:
        ids = tokenizer.encode(text)
        check(tokenizer, ids)
        # No character is given out in part: a stand-in appears only where the whole has one.
        decoder = StreamDecoder(tokenizer)
        pushed = "".join(decoder.push(token) for token in ids)
        assert pushed.count(UNFINISHED) <= tokenizer.decode(ids).count(UNFINISHED)

    any_of_them()
    for text in (*HARD, *corpus()):
        check(tokenizer, tokenizer.encode(text))


def test_any_tokens_in_any_order(tokenizer: Tokenizer) -> None:
    @quick
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40), st.booleans())
    def any_of_them(ids: list[int], skip_special: bool) -> None:
        check(tokenizer, ids, skip_special)

    any_of_them()


def byte_tokens(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens that are one byte, where every byte has one."""
    found = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256)]
    if None in found:
        plain = Tokenizer.bytes_only()
        spelled = sorted(plain.core.get_vocab(), key=plain.core.get_vocab().__getitem__)[3:]
        found = [tokenizer.token_id(sign) for sign in spelled]
    return [number for number in found if number is not None]


def test_stray_bytes(tokenizer: Tokenizer) -> None:
    """Bytes of characters cut anywhere and mixed with words."""
    ids = byte_tokens(tokenizer)
    if len(ids) < 256:
        pytest.skip("this kind has no tokens for bytes")

    @quick
    @given(st.lists(st.one_of(st.sampled_from(ids), st.integers(0, tokenizer.vocab_size - 1)), max_size=30))
    def any_of_them(some: list[int]) -> None:
        check(tokenizer, some)

    any_of_them()
    draw = random.Random(3)
    for _ in range(10):
        check(tokenizer, [draw.choice(ids) for _ in range(150)])


def test_a_character_comes_with_its_last_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🙂")
    if tokenizer.decode(ids).strip() != "🙂" or len(ids) < 2:
        pytest.skip("this kind has no tokens for bytes")
    decoder = StreamDecoder(tokenizer)
    given_out = [decoder.push(token) for token in ids]
    assert given_out[-1] == "🙂" and "".join(given_out[:-1]).strip() == "" and decoder.flush() == ""


def test_an_unfinished_character_is_told_at_the_end() -> None:
    tokenizer = Tokenizer.bytes_only()
    decoder = StreamDecoder(tokenizer)
    first, second, *_ = tokenizer.encode("中")
    assert decoder.push(first) == decoder.push(second) == ""
    assert decoder.flush() == UNFINISHED
    assert decoder.push(first) == ""
    assert decoder.push(tokenizer.encode("a")[0]) == UNFINISHED + "a"


def test_special_tokens_are_left_out_or_shown() -> None:
    tokenizer = Tokenizer.bytes_only()
    ids = tokenizer.encode("a<|im_end|>b", special=True)
    assert len(ids) == 3
    for skip, wanted in ((True, ["a", "", "b"]), (False, ["a", "<|im_end|>", "b"])):
        decoder = StreamDecoder(tokenizer, skip_special=skip)
        assert [decoder.push(token) for token in ids] == wanted


def test_a_long_text_keeps_a_short_tail(tokenizer: Tokenizer) -> None:
    decoder = StreamDecoder(tokenizer)
    for token in tokenizer.encode(" ".join(corpus())[:3000]):
        decoder.push(token)
        assert len(decoder._tail) <= 10
