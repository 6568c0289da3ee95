"""What is drawn and what is shown: distributions against Transformers' processors, seeds, stops, streams, limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.generate.lm import LanguageModel
from ratoon.generate.sample import Sampling, draw, keep_min_p, keep_top_k, keep_top_p, penalize_repetition, warp
from ratoon.model.config import ModelConfig
from ratoon.model.transformer import Transformer
from ratoon.text.chat import render
from ratoon.text.tokenizer import TURN_END, Tokenizer
from test_generate import build

TEXTS = ["The cat sat on the mat.\n", "中文的句子也要一个字一个字地出来。🙂🙂", "stop here, or stop there"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS * 3, vocab_size=300)


@pytest.fixture(scope="module")
def lm(tokenizer: Tokenizer) -> LanguageModel:
    """A random model: what it writes has no sense, stray bytes included."""
    return LanguageModel(build(vocab_size=tokenizer.vocab_size, eos_ids=()), tokenizer)


def scripted(tokenizer: Tokenizer, scripts: dict[int, Sequence[int]], context: int = 128) -> LanguageModel:
    """A model that says by heart: after `place` tokens it says `scripts[place]`, whatever those tokens were. Its scores
    come from learned positions alone, through every part of a GPT-2."""
    cfg = ModelConfig(
        family="gpt2",
        vocab_size=tokenizer.vocab_size,
        width=context,
        layers=1,
        heads=1,
        mlp_width=8,
        context_tokens=context,
        norm="layer",
        positions="learned",
        mlp="gelu_tanh",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        eos_ids=() if tokenizer.eos_id is None else (tokenizer.eos_id,),
    )
    model = Transformer(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        assert model.place is not None
        model.place.weight.copy_(20.0 * torch.eye(context))
        for place, ids in scripts.items():
            for step, id in enumerate(ids):
                model.embed.weight[id, place - 1 + step] = 1.0
    return LanguageModel(model, tokenizer)


def says(tokenizer: Tokenizer, prompt: str, text: str, **more: Any) -> LanguageModel:
    """A model that answers `prompt` with `text` and the end."""
    before = len(tokenizer.encode_prompt(prompt))
    assert tokenizer.eos_id is not None
    return scripted(tokenizer, {before: [*tokenizer.encode(text), tokenizer.eos_id]}, **more)


# -- distributions ---------------------------------------------------------------------------------------------------


def random_logits(rows: int = 6, vocab: int = 700, seed: int = 0, scale: float = 4.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def same_distribution(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.isfinite(), theirs.isfinite())
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1))


@pytest.mark.parametrize("k", [1, 2, 40, 5000])
def test_top_k_equals_transformers(k: int) -> None:
    from transformers import TopKLogitsWarper

    logits = random_logits()
    same_distribution(keep_top_k(logits, k), TopKLogitsWarper(k)(torch.zeros(6, 1, dtype=torch.long), logits.clone()))


@pytest.mark.parametrize("p", [0.01, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.05, 4.0])
def test_top_p_equals_transformers(p: float, scale: float) -> None:
    """Flat scores too: then the few hundred tokens that are looked at first do not reach p."""
    from transformers import TopPLogitsWarper

    logits = random_logits(scale=scale)
    theirs = TopPLogitsWarper(p)(torch.zeros(6, 1, dtype=torch.long), logits.clone())
    found = keep_top_p(logits, p)
    differing = (found.isfinite() != theirs.isfinite()).sum(-1)
    assert int(differing.max()) <= 1  # the token at the border: sums taken in other orders
    border = logits.sort(-1, descending=True)
    reached = (border.values.double().softmax(-1).cumsum(-1) < p - 1e-6).sum(-1)
    assert (found.isfinite().sum(-1) >= reached + (reached < logits.shape[-1])).all()
    same_distribution(found[differing == 0], theirs[differing == 0])
    assert int((differing == 0).sum()) >= 4


@pytest.mark.parametrize("min_p", [0.001, 0.1, 0.9, 1.0])
def test_min_p_equals_transformers(min_p: float) -> None:
    from transformers import MinPLogitsWarper

    logits = random_logits()
    theirs = MinPLogitsWarper(min_p)(torch.zeros(6, 1, dtype=torch.long), logits.clone())
    same_distribution(keep_min_p(logits, min_p), theirs)


@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = random_logits(vocab=50)
    ids = torch.randint(0, 50, (6, 20), generator=torch.Generator().manual_seed(3))
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, ids, True)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits.clone())
    torch.testing.assert_close(penalize_repetition(logits, seen, penalty), theirs)


def test_all_of_them_in_transformers_order() -> None:
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = random_logits(rows=40)
    sampling = Sampling(temperature=1.7, top_k=60, top_p=0.8, min_p=0.03)
    theirs = LogitsProcessorList(
        [TemperatureLogitsWarper(1.7), TopKLogitsWarper(60), TopPLogitsWarper(0.8), MinPLogitsWarper(0.03)]
    )(torch.zeros(40, 1, dtype=torch.long), logits.clone())
    found = warp(logits, sampling)
    kept = found.isfinite().sum(-1)
    assert int(kept.min()) < int(kept.max()) < 60
    same_distribution(found, theirs)


def test_what_is_drawn_follows_the_probabilities() -> None:
    """Every point of a fine grid of uniform numbers, once: the counts are the probabilities themselves."""
    logits = keep_top_k(random_logits(rows=1, vocab=30, scale=1.5), 12)
    points = 20_000
    grid = [(i + 0.5) / points for i in range(points)]
    tokens = draw(logits.expand(points, -1), grid)
    share = torch.bincount(tokens, minlength=30) / points
    torch.testing.assert_close(share, logits[0].softmax(-1), atol=2 / points, rtol=0)
    assert draw(logits, [1 - 1e-16]).item() in logits[0].isfinite().nonzero().flatten().tolist()


def test_a_repetition_penalty_in_the_loop_equals_transformers(lm: LanguageModel, tmp_path: Any) -> None:
    """Prompt and answer both count as seen; greedy with penalty, the whole way through both libraries."""
    from transformers import AutoModelForCausalLM

    lm.save(tmp_path / "m")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    prompt = [5, 9, 100, 7]
    theirs = peer.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, repetition_penalty=1.3, eos_token_id=None
    )[0, 4:].tolist()
    (found,) = lm.generate([prompt], max_new_tokens=30, repetition_penalty=1.3)
    assert found.ids == theirs[: len(found.ids)] and len(found.ids) >= 10


# -- seeds -----------------------------------------------------------------------------------------------------------

DRAWN: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95}


def test_the_same_seed_gives_the_same_text_whoever_stands_beside(lm: LanguageModel) -> None:
    prompts = ["The cat", "中文", "s", "stop here, or", "The mat"]
    alone = [lm.generate([prompt], seed=7, **DRAWN)[0].ids for prompt in prompts]
    assert [one.ids for one in lm.generate(prompts, seed=7, **DRAWN)] == alone
    assert [one.ids for one in lm.generate(prompts[::-1], seed=7, **DRAWN)] == alone[::-1]
    assert [one.ids for one in lm.generate(prompts, seed=8, **DRAWN)] != alone
    assert len({tuple(ids) for ids in alone}) == len(alone)


def test_equal_prompts_draw_differently_and_repeatably(lm: LanguageModel) -> None:
    found = [one.ids for one in lm.generate(["The cat"] * 4, seed=3, **DRAWN)]
    assert len({tuple(ids) for ids in found}) == 4
    assert found == [one.ids for one in lm.generate(["The cat"] * 4, seed=3, **DRAWN)]
    assert found[0] == lm.generate(["The cat"], seed=3, **DRAWN)[0].ids


def test_torchs_own_seed_is_neither_used_nor_moved(lm: LanguageModel) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = lm.generate(["The cat"], seed=3, **DRAWN)[0].ids
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert lm.generate(["The cat"], seed=3, **DRAWN)[0].ids == one


# -- stop texts and streams ------------------------------------------------------------------------------------------


def streamed(lm: LanguageModel, prompts: list[str], **settings: Any) -> tuple[list[list[str]], list[Any]]:
    pieces: list[list[str]] = [[] for _ in prompts]
    found = lm.generate(prompts, on_text=lambda number, text: pieces[number].append(text), **settings)
    return pieces, found


@pytest.mark.parametrize("stop", ["stop", "re, or", " there", "字一", "🙂🙂", "\n", "p h"])
def test_a_stop_text_is_found_across_tokens_and_never_shown(tokenizer: Tokenizer, stop: str) -> None:
    said = "stop her, stop here, or stop there: 一个字一个字地🙂🙂\nand on"
    lm = says(tokenizer, "x", said)
    pieces, (found,) = streamed(lm, ["x"], stop=stop, max_new_tokens=100)
    assert found.finish == "stop"
    assert found.text == said[: said.index(stop)] == "".join(pieces[0])
    assert len(found.ids) <= len(tokenizer.encode(said))
    read = tokenizer.decode(found.ids)
    assert stop in read or stop == "🙂🙂"


def test_some_stop_texts_do_span_tokens(tokenizer: Tokenizer) -> None:
    """Else the test above would prove little."""
    ids = tokenizer.encode("stop here, or")
    assert not any("re, or" in tokenizer.decode([id]) for id in ids)
    assert len(tokenizer.encode("🙂")) >= 1


def test_the_first_of_several_stop_texts_ends_the_answer(tokenizer: Tokenizer) -> None:
    lm = says(tokenizer, "x", "one, two, three")
    assert lm.generate(["x"], stop=["three", "tw", "two"], max_new_tokens=60)[0].text == "one, "
    (found,) = lm.generate(["x"], stop=["thre3"], max_new_tokens=60)
    assert (found.text, found.finish) == ("one, two, three", "eos")


def test_what_could_begin_a_stop_text_is_held_back_until_it_is_not(tokenizer: Tokenizer) -> None:
    lm = says(tokenizer, "x", "abcabd.abc")
    pieces, (found,) = streamed(lm, ["x"], stop="abcd", max_new_tokens=60)
    assert "".join(pieces[0]) == found.text == "abcabd.abc"  # nothing is lost at the end


@pytest.mark.parametrize("settings", [{}, {"stop": ["zzz", "的句x"]}])
def test_pieces_join_to_the_text_and_split_no_character(tokenizer: Tokenizer, settings: dict[str, Any]) -> None:
    said = "中文的句子🙂🙂 naïve — \U0001f469‍\U0001f52c 完"
    lm = says(tokenizer, "x", said)
    assert len(tokenizer.encode(said)) > len(said) - 6  # many characters are several tokens
    pieces, (found,) = streamed(lm, ["x"], max_new_tokens=100, **settings)
    assert "".join(pieces[0]) == found.text == said
    assert all(piece and "\ufffd" not in piece for piece in pieces[0])
    assert len(pieces[0]) > 5  # it does come bit by bit


def test_a_character_cut_by_the_limit_is_shown_as_such_once(tokenizer: Tokenizer) -> None:
    lm = says(tokenizer, "x", "a𝄞b")
    assert len(tokenizer.encode("𝄞")) == 4
    for tokens, wanted in ((1, "a"), (2, "a\ufffd"), (4, "a\ufffd"), (5, "a𝄞"), (6, "a𝄞b")):
        pieces, (found,) = streamed(lm, ["x"], max_new_tokens=tokens)
        assert "".join(pieces[0]) == found.text == wanted


def test_streams_of_stray_bytes_join_too(lm: LanguageModel) -> None:
    """A random model: text that is no text."""
    prompts = ["The cat", "中", "stop"]
    pieces, found = streamed(lm, prompts, seed=5, max_new_tokens=60, temperature=1.5)
    for shown, one in zip(pieces, found, strict=True):
        assert "".join(shown) == one.text
        assert lm.tokenizer is not None
        assert one.text == lm.tokenizer.decode(one.ids)


def test_streams_of_a_batch_do_not_mix(tokenizer: Tokenizer, lm: LanguageModel) -> None:
    prompts = ["The cat", "中文的", "stop here"]
    pieces, found = streamed(lm, prompts, seed=1, stop=["cat", "at"], **DRAWN)
    for prompt, shown, one in zip(prompts, pieces, found, strict=True):
        alone, (single,) = streamed(lm, [prompt], seed=1, stop=["cat", "at"], **DRAWN)
        assert (shown, one) == (alone[0], single)


# -- what does not fit -----------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_refused_or_shortened_aloud(lm: LanguageModel) -> None:
    prompt = "The cat sat on the mat. " * 20
    ids = lm.encode(prompt)
    assert len(ids) > lm.context_tokens
    with pytest.raises(DataError, match=f"the prompt has {len(ids):,} tokens") as caught:
        lm.generate(["The cat", prompt], max_new_tokens=4)
    assert caught.value.where == "prompt 1" and "--shorten left" in str(caught.value)
    for tokens in (4, 1000):
        (found,) = lm.generate([prompt], shorten="left", max_new_tokens=tokens)
        assert found.dropped_prompt_tokens == len(ids) - found.prompt_tokens > 0
        assert found.prompt_tokens >= lm.context_tokens // 2
        assert found.ids == lm.generate([ids[found.dropped_prompt_tokens :]], max_new_tokens=tokens)[0].ids
    assert found.finish == "context" and found.prompt_tokens + len(found.ids) == lm.context_tokens + 1


def test_a_prompt_that_fits_is_not_touched(lm: LanguageModel) -> None:
    (found,) = lm.generate(["The cat"], shorten="left", max_new_tokens=4)
    assert found.dropped_prompt_tokens == 0 and found.ids == lm.generate(["The cat"], max_new_tokens=4)[0].ids


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_k": 5}, "no effect at temperature 0"),
        ({"num_beams": 2, "temperature": 0.5}, "beam search draws nothing"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p"),
        ({"stop": [""]}, "empty stop text"),
        ({"length_penalty": 2.0}, "no effect without num_beams"),
        ({"min_new_tokens": 9, "max_new_tokens": 3}, "more than max_new_tokens"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
    ],
)
def test_impossible_settings_are_refused(lm: LanguageModel, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lm.generate(["x"], **settings)


def test_without_a_tokenizer_ids_work_and_text_says_what_is_missing(lm: LanguageModel) -> None:
    bare = LanguageModel(lm.model)
    assert bare.generate([[5, 6]], max_new_tokens=3)[0].ids == lm.generate([[5, 6]], max_new_tokens=3)[0].ids
    for ask in (lambda: bare.generate(["x"]), lambda: bare.chat([{"role": "user", "content": "x"}])):
        attempt: Callable[[], Any] = ask
        with pytest.raises(ArtifactError, match="needs a tokenizer"):
            attempt()
    with pytest.raises(ConfigError, match="need a tokenizer"):
        bare.generate([[5]], stop="x")


# -- conversations ---------------------------------------------------------------------------------------------------


def test_a_turns_end_ends_an_answer_though_the_model_does_not_name_it(tokenizer: Tokenizer) -> None:
    """The end token of these tokenizers is that of a document; the template ends turns with another."""
    asked = [{"role": "user", "content": "hi"}]
    before = len(render(tokenizer, asked, add_generation_prompt=True).ids)
    turn_end = tokenizer.token_id(TURN_END)
    assert turn_end is not None and turn_end != tokenizer.eos_id
    lm = scripted(tokenizer, {before: [*tokenizer.encode("The cat."), turn_end, *tokenizer.encode("and more")]})
    answer = lm.chat(asked, max_new_tokens=40)
    assert (answer.text, answer.finish) == ("The cat.", "eos")
    assert set(lm.turn_end_ids) == {tokenizer.eos_id, turn_end}
    assert lm.eos_ids == (tokenizer.eos_id,)
