"""Held-out loss, bits per byte, intervals and likelihoods: against plain loops, exact formulas and Transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

import made_tokenizers
from ratoon.base.errors import ArtifactError, ConfigError, DataError, NumericError
from ratoon.base.seeds import stream
from ratoon.data.ledger import Ledger
from ratoon.data.loader import held_out_batches
from ratoon.data.prepare import prepare
from ratoon.data.shards import Shards, ShardWriter
from ratoon.data.sources import Document
from ratoon.evaluate import run as run_module
from ratoon.evaluate.interval import ratio_interval, share_interval, student_975
from ratoon.evaluate.pairs import read_pairs, score_pairs
from ratoon.evaluate.run import Report, held_out
from ratoon.evaluate.score import LocalScorer, _Window
from ratoon.evaluate.texts import as_shards
from ratoon.generate.lm import LanguageModel
from ratoon.generate.sample import Sampling
from ratoon.model.config import ModelConfig
from ratoon.model.transformer import Transformer
from ratoon.store.artifact import Parent
from ratoon.text.lengths import added_bytes, token_bytes
from ratoon.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from test_generate import build, randomize

TEXTS = (
    "The cat sat on the mat, and the mat was flat.\n",
    "中文的句子也要数清楚,一个字节都不能少。",
    "Naïve café — 🙂🙂 done.",
    "x",
    "A longer document that goes on over the border of a row, so that it is met again in the next one. " * 3,
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(list(TEXTS) * 3, vocab_size=290)


@pytest.fixture(scope="module")
def lm(tokenizer: Tokenizer) -> LanguageModel:
    model = build(vocab_size=tokenizer.vocab_size, context_tokens=128)
    return LanguageModel(model, tokenizer)


def write(folder: Path, tokenizer: Tokenizer, texts: Iterable[str] = TEXTS, separator: int | None = None) -> Shards:
    """Texts as shards; `separator` -1 stands for none."""
    separator_id = tokenizer.separator_id if separator is None else None
    writer = ShardWriter(folder, tokenizer.vocab_size)
    for number, text in enumerate(texts):
        ids = ([] if separator_id is None else [separator_id]) + tokenizer.encode(text)
        writer.add(ids, len(text.encode()), f"texts:{number}")
    writer.close(Parent(kind="tokenizer", hash=tokenizer.hash), separator_id)
    return Shards(folder)


def as_documents(texts: Iterable[str]) -> list[Document]:
    return [Document(text, "texts", number, len(text.encode())) for number, text in enumerate(texts, start=1)]


@torch.no_grad()
def naive(model: Transformer, shards: Shards, row: int, stride: int | None = None) -> dict[str, float]:
    """Loss and bits per byte by definition, in float64: token by token, each read anew with all that it may see."""
    wide = Transformer(model.cfg)
    wide.load_state_dict(model.state_dict())
    wide.double()
    ids = shards.tokens(0, shards.n_tokens)
    documents = np.searchsorted(shards.document_starts, np.arange(len(ids)), side="right") - 1
    row, last = min(row, len(ids) - 1), len(ids) - 1 - min(row, len(ids) - 1)
    starts = sorted({*range(0, last, min(stride or row, row)), last})
    nats = text_nats = 0.0
    tokens = covered = 0
    for start in starts:
        for target in range(max(covered, start) + 1, start + row + 1):
            begin = max(start, int(shards.document_starts[documents[target - 1]]))
            ends = documents[target] != documents[target - 1]
            if ends and shards.separator_id is None:
                continue
            logits = wide.logits(wide(torch.tensor(ids[begin:target])[None]))[0, -1]
            loss = -float(logits.log_softmax(-1)[ids[target]])
            nats, tokens = nats + loss, tokens + 1
            text_nats += 0.0 if ends else loss
        covered = start + row
    return {"loss": nats / tokens, "tokens": tokens, "bits": text_nats / math.log(2)}


# -- held-out loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [None, 24, 7, 1])
def test_loss_equals_a_naive_loop(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path, stride: int | None) -> None:
    shards = write(tmp_path / "s", tokenizer)
    wanted = naive(lm.model, shards, 24, stride)
    found = held_out(lm.model, shards, context_tokens=24, rows=5, stride_tokens=stride, tokenizer=tokenizer)
    assert found.n_tokens == wanted["tokens"] == shards.n_tokens - 1
    assert found.loss == pytest.approx(wanted["loss"], rel=2e-6)
    assert found.perplexity == pytest.approx(math.exp(wanted["loss"]), rel=2e-5)
    assert found.n_bytes == sum(len(text.encode()) for text in TEXTS)
    assert found.bits_per_byte == pytest.approx(wanted["bits"] / found.n_bytes, rel=2e-6)
    assert found.n_documents == len(TEXTS)


def test_more_text_before_a_token_changes_what_is_measured(
    lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Else the naive loop's windows would prove nothing."""
    shards = write(tmp_path / "s", tokenizer)
    losses = {held_out(lm.model, shards, context_tokens=24, rows=5, stride_tokens=s).loss for s in (None, 7, 1)}
    assert len(losses) == 3


def test_without_a_separator_no_end_is_predicted(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = write(tmp_path / "s", tokenizer, separator=-1)
    wanted = naive(lm.model, shards, 24)
    found = held_out(lm.model, shards, context_tokens=24, rows=5, tokenizer=tokenizer)
    assert found.n_tokens == wanted["tokens"] == shards.n_tokens - len(TEXTS)
    assert found.loss == pytest.approx(wanted["loss"], rel=2e-6)
    first = sum(len(tokenizer.decode(tokenizer.encode(text)[:1]).encode()) for text in TEXTS if text[0] in "TANxZ")
    chinese = int(token_bytes(tokenizer)[tokenizer.encode(TEXTS[1])[0]])  # perhaps a part of a character
    assert found.n_bytes == sum(len(text.encode()) for text in TEXTS) - first - chinese


def test_rows_at_once_do_not_matter(
    lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write(tmp_path / "s", tokenizer)
    found = [held_out(lm.model, shards, context_tokens=16, rows=rows, tokenizer=tokenizer) for rows in (1, 3, 1000)]
    monkeypatch.setitem(run_module.MOST_TOKENS, "cpu", 40)
    found.append(held_out(lm.model, shards, context_tokens=16, rows=1000, tokenizer=tokenizer))
    for one in found[1:]:
        assert one.loss == pytest.approx(found[0].loss, rel=1e-6)
        assert one.interval == pytest.approx(found[0].interval, rel=1e-5)
        assert (one.n_tokens, one.n_bytes) == (found[0].n_tokens, found[0].n_bytes)


@pytest.mark.parametrize("limit", [10, 40, 100, 170])
def test_a_limit_counts_the_bytes_of_the_very_tokens_it_leaves(
    lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path, limit: int
) -> None:
    shards = write(tmp_path / "s", tokenizer)
    found = held_out(lm.model, shards, context_tokens=16, rows=4, limit_tokens=limit, tokenizer=tokenizer)
    lengths, tokens, size = token_bytes(tokenizer), 0, 0
    assert lengths is not None
    for batch in held_out_batches(shards, rows=4, context_tokens=16, limit_tokens=limit):
        targets = batch.targets_BT[batch.weight_BT != 0]
        tokens, size = tokens + len(targets), size + int(lengths[targets].sum())
    assert found.n_tokens == tokens <= max(limit, 16)
    assert found.n_bytes == size
    assert 0 < size < shards.bytes_of_text


def test_limits_with_a_stride_stay_below_the_limit(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = write(tmp_path / "s", tokenizer)
    for limit in (16, 30, 64, 150):
        found = held_out(lm.model, shards, context_tokens=16, rows=4, limit_tokens=limit, stride_tokens=4)
        assert found.n_tokens <= limit


def test_bytes_of_a_cut_document_are_unknown_without_a_tokenizer(
    lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Never a guess: whole documents need no tokenizer, one that was cut does."""
    shards = write(tmp_path / "s", tokenizer)
    assert held_out(lm.model, shards, context_tokens=16, rows=4).n_bytes == shards.bytes_of_text
    found = held_out(lm.model, shards, context_tokens=16, rows=4, limit_tokens=64)
    assert found.n_bytes is None and found.bits_per_byte is None and found.bits_per_byte_interval is None
    assert math.isfinite(found.loss)


def test_the_tokenizer_beside_prepared_shards_is_found(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text(
        "".join(f'{{"text": "document number {n} of many, {n * n}"}}\n' for n in range(60))
    )
    prepared = prepare([tmp_path / "texts.jsonl"], tmp_path / "p", tokenizer=tokenizer, held_out_fraction=0.5)
    found = held_out(lm.model, prepared.held_out, context_tokens=32, rows=4, limit_tokens=300)
    named = held_out(lm.model, prepared.held_out, context_tokens=32, rows=4, limit_tokens=300, tokenizer=tokenizer)
    assert found.as_dict() == named.as_dict()
    assert found.n_bytes is not None and found.interval_of == "documents"


def test_bfloat16_is_near_and_says_so(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = write(tmp_path / "s", tokenizer)
    exact = held_out(lm.model, shards, context_tokens=24, rows=5, tokenizer=tokenizer)
    low = Transformer(lm.model.cfg)
    low.load_state_dict(lm.model.state_dict())
    low.to(torch.bfloat16)
    found = held_out(low, shards, context_tokens=24, rows=5, tokenizer=tokenizer)
    assert found.loss == pytest.approx(exact.loss, rel=0.02)
    assert found.loss != exact.loss
    assert "bfloat16" in found.signature and "float32" in exact.signature


def test_a_model_in_training_stays_in_training(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = write(tmp_path / "s", tokenizer)
    lm.model.train()
    lm.model.recompute_blocks = True
    found = held_out(lm.model, shards, context_tokens=24, rows=5)
    assert lm.model.training
    lm.model.recompute_blocks = False
    lm.model.eval()
    assert found.loss == held_out(lm.model, shards, context_tokens=24, rows=5).loss
    assert not lm.model.training


def test_what_cannot_be_measured_is_refused(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    shards = write(tmp_path / "s", tokenizer)
    with pytest.raises(ConfigError, match="context_tokens is 129"):
        held_out(lm.model, shards, context_tokens=129, rows=1)
    with pytest.raises(ConfigError, match="stride is 17"):
        held_out(lm.model, shards, context_tokens=16, rows=1, stride_tokens=17)
    with pytest.raises(DataError, match="nothing can be measured"):
        held_out(lm.model, write(tmp_path / "t", tokenizer, ["x"]), context_tokens=16, rows=1)
    with pytest.raises(ArtifactError, match="the model knows 61"):
        held_out(build(), shards, context_tokens=16, rows=1)
    broken = build(vocab_size=tokenizer.vocab_size)
    with torch.no_grad():
        broken.final_norm.weight[0] = math.nan
    with pytest.raises(NumericError, match="not finite") as caught:
        held_out(broken, shards, context_tokens=16, rows=2)
    assert caught.value.where == "texts:0 (token 0)"


# -- bits per byte ---------------------------------------------------------------------------------------------------


def unigram(tokenizer: Tokenizer, logprob: dict[int, float]) -> Transformer:
    """A model that gives each token the same probability everywhere."""
    cfg = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        width=8,
        layers=1,
        heads=1,
        mlp_width=8,
        context_tokens=64,
        tied_embeddings=False,
        head_bias=True,
    )
    model = Transformer(cfg)
    randomize(model)
    with torch.no_grad():
        assert model.head is not None
        model.head.weight.zero_()
        model.head.bias.fill_(-1e4)
        for id, value in logprob.items():
            model.head.bias[id] = value
    return model


def test_bits_per_byte_are_those_of_the_text_whatever_the_tokenizer(tmp_path: Path) -> None:
    """A source of letters a and b with p(a) = 0.8, spelled letter by letter, and in pairs of letters: the same model of
    the same text. Nats per token differ by a factor of two, bits per byte do not, and both are the formula's."""
    p = {"a": 0.8, "b": 0.2}
    end = 0.01
    random = stream(0, "letters")
    texts = ["".join(random.choice(["a", "b"], 2 * int(random.integers(3, 40)), p=[0.8, 0.2])) for _ in range(30)]

    letters = Tokenizer.bytes_only()
    pairs = Tokenizer.train([], vocab_size=256 + len(SPECIAL_TOKENS))
    pairs = paired(pairs)
    reports = {}
    for name, tokenizer in (("letters", letters), ("pairs", pairs)):
        table = {tokenizer.separator_id: math.log(end)}
        units = ["a", "b"] if name == "letters" else ["aa", "ab", "ba", "bb"]
        for unit in units:
            (id,) = tokenizer.encode(unit)
            table[id] = math.log((1 - end) * math.prod(p[letter] for letter in unit))
        shards = write(tmp_path / name, tokenizer, texts)
        reports[name] = held_out(unigram(tokenizer, table), shards, context_tokens=32, rows=8, tokenizer=tokenizer)

    whole = "".join(texts)
    entropy = sum(-math.log2(p[letter]) for letter in whole)
    for name, width in (("letters", 1), ("pairs", 2)):
        found = reports[name]
        assert found.n_bytes == len(whole)
        tokens = len(whole) / width
        assert found.bits_per_byte == pytest.approx((entropy - tokens * math.log2(1 - end)) / len(whole), rel=1e-5)
        assert found.n_tokens == tokens + len(texts) - 1
        nats = entropy * math.log(2) - tokens * math.log(1 - end) - (len(texts) - 1) * math.log(end)
        assert found.loss == pytest.approx(nats / found.n_tokens, rel=1e-5)


def paired(tokenizer: Tokenizer) -> Tokenizer:
    """The byte tokenizer with four merges: aa, ab, ba, bb."""
    import json

    from tokenizers import Tokenizer as Core

    table = json.loads(tokenizer.core.to_str())
    for pair in ("aa", "ab", "ba", "bb"):
        table["model"]["vocab"][pair] = len(table["model"]["vocab"])
        table["model"]["merges"].append([pair[0], pair[1]])
    # Pairs from the left: a text of even length falls into them.
    from tokenizers import Regex, pre_tokenizers

    core = Core.from_str(json.dumps(table))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex("[ab]{2}"), behavior="isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    return Tokenizer(core, tokenizer.config)


def test_a_uniform_model_over_bytes_costs_eight_bits_and_the_end(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes_only()
    vocabulary = dict.fromkeys(range(tokenizer.vocab_size), 0.0)
    shards = write(tmp_path / "s", tokenizer)
    found = held_out(unigram(tokenizer, vocabulary), shards, context_tokens=32, rows=8, tokenizer=tokenizer)
    assert found.bits_per_byte == pytest.approx(math.log2(256 + len(SPECIAL_TOKENS)), rel=1e-6)
    assert found.perplexity == pytest.approx(tokenizer.vocab_size, rel=1e-5)


def test_lengths_of_tokens_are_those_of_what_they_decode_to(tokenizer: Tokenizer) -> None:
    for one in (tokenizer, Tokenizer.bytes_only()):
        lengths = token_bytes(one)
        assert lengths is not None and len(lengths) == one.vocab_size
        for text in TEXTS:
            assert int(lengths[one.encode(text)].sum()) == len(text.encode())
        assert all(lengths[id] == 0 for id in one.special_ids)


@pytest.mark.parametrize(("name", "added"), [("gpt2", 0), ("llama", 1), ("llama3", 0), ("metaspace", None)])
def test_lengths_in_other_peoples_tokenizers(tmp_path: Path, name: str, added: int | None) -> None:
    """A space put before a text is nobody's byte; where one unknown token stands for anything, no length is known."""
    one = Tokenizer.load(getattr(made_tokenizers, name)(tmp_path / name))
    lengths = token_bytes(one)
    if added is None:
        assert lengths is None
        return
    assert lengths is not None and added_bytes(one, lengths) == added
    for text in (*TEXTS, "  two", "x\n\ny"):
        assert int(lengths[one.encode(text)].sum()) - added == len(text.encode())


def test_a_cut_document_of_a_llama_tokenizer_counts_without_the_space(tmp_path: Path) -> None:
    one = Tokenizer.load(made_tokenizers.llama(tmp_path / "t"))
    model = build(vocab_size=one.vocab_size)
    text = TEXTS[4] * 3
    shards = write(tmp_path / "s", one, [text])
    found = held_out(model, shards, context_tokens=8, rows=1, limit_tokens=8, tokenizer=one)
    assert found.n_bytes == len(one.decode(shards.tokens(0, 9).tolist()).encode()) < len(text)


# -- intervals -------------------------------------------------------------------------------------------------------


def test_students_quantiles() -> None:
    for degrees, wanted in ((1, 12.706), (2, 4.303), (5, 2.571), (6, 2.447), (7, 2.365), (20, 2.086), (1000, 1.962)):
        assert student_975(degrees) == pytest.approx(wanted, abs=1.5e-3)


@pytest.mark.parametrize("documents", [8, 25, 200])
def test_the_interval_covers_as_often_as_it_says(documents: int) -> None:
    """Documents of unequal length whose own level the losses of all their tokens share: intervals that took tokens for
    independent would be far too narrow."""
    random = stream(1, "coverage", documents)
    covered = naive_covered = 0
    trials = 600
    for _ in range(trials):
        tokens = random.integers(20, 200, documents).astype(np.float64)
        level = 3.0 + 0.5 * random.standard_normal(documents)
        nats = tokens * level + np.sqrt(tokens) * random.standard_normal(documents)
        low, high = ratio_interval(nats, tokens)  # type: ignore[misc]
        covered += low <= 3.0 <= high
        reach = 1.96 * math.sqrt(1.25 / tokens.sum())
        naive_covered += abs(nats.sum() / tokens.sum() - 3.0) <= reach
    assert 0.92 <= covered / trials <= 0.975
    assert naive_covered / trials < 0.6


def test_intervals_do_not_depend_on_the_scale_of_what_is_counted() -> None:
    nats, tokens = np.array([10.0, 30.0, 14.0]), np.array([5.0, 11.0, 8.0])
    low, high = ratio_interval(nats, tokens)  # type: ignore[misc]
    assert ratio_interval(2 * nats, tokens) == pytest.approx((2 * low, 2 * high))
    # By hand: ratio 54/24, residuals nats - ratio tokens, t(2) = 4.3027.
    residual = nats - 2.25 * tokens
    error = math.sqrt(1.5 * float((residual**2).sum())) / 24
    assert (low, high) == pytest.approx((2.25 - 4.3027 * error, 2.25 + 4.3027 * error))
    assert ratio_interval(nats[:1], tokens[:1]) is None


def test_shares() -> None:
    low, high = share_interval(5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)  # Wilson's interval, worked by hand
    assert share_interval(0, 3)[0] == pytest.approx(0, abs=1e-12) and 0.5 < share_interval(0, 3)[1] < 0.6
    assert share_interval(3, 3)[1] == pytest.approx(1)


def test_few_documents_are_measured_by_runs_and_many_by_document(
    lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    def measured(name: str, texts: Iterable[str]) -> Report:
        return held_out(
            lm.model, write(tmp_path / name, tokenizer, texts), context_tokens=32, rows=8, tokenizer=tokenizer
        )

    few, many = measured("few", [TEXTS[4] * 5]), measured("many", [f"{n} {TEXTS[n % 6]}" for n in range(12)])
    assert few.interval_of == f"runs of {few.run_tokens} tokens" and many.interval_of == "documents"
    for found in (few, many):
        low, high = found.interval
        bits_low, bits_high = found.bits_per_byte_interval  # type: ignore[misc]
        assert low < found.loss < high and bits_low < found.bits_per_byte < bits_high
        figures = found.as_dict()
        assert figures["perplexity_interval"] == pytest.approx([math.exp(low), math.exp(high)])
        # Documents and runs are two ways of adding up the same losses.
        for one, other in zip(vars(found.documents).items(), vars(found.runs).items(), strict=True):
            if one[0] not in ("units", "bytes"):
                assert one[1].sum() == pytest.approx(other[1].sum())


# -- files that were never prepared ----------------------------------------------------------------------------------


def test_documents_are_measured_like_a_prepared_part(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    ledger = Ledger()
    with as_shards(as_documents([TEXTS[0], "  \n", *TEXTS[1:], TEXTS[0]]), tokenizer, ledger) as shards:
        found = held_out(lm.model, shards, context_tokens=24, rows=5, tokenizer=tokenizer)
        folder = shards.folder
    assert not folder.exists()
    wanted = held_out(lm.model, write(tmp_path / "s", tokenizer, [*TEXTS, TEXTS[0]]), context_tokens=24, rows=5)
    assert found.loss == wanted.loss and found.n_documents == len(TEXTS) + 1
    book, spaces = ledger.as_dict(), len(tokenizer.encode("  \n"))
    assert book["read"]["documents"] == len(TEXTS) + 2
    assert book["accounts"]["empty"] == {"documents": 1, "bytes": 3, "tokens": spaces, "places": ["texts:2"]}


# -- likelihoods -----------------------------------------------------------------------------------------------------

PAIRS = [
    ("The cat sat on", " the mat"),
    ("The cat sat on ", "the mat"),
    ("", "Naïve café"),
    ("中文的句子", "也要数清楚"),
    ("The c", "at"),
    ("A longer document that goes on over the border of a row, so that", " it is met again"),
    ("x", "y"),
]


@torch.no_grad()
def by_hand(lm: LanguageModel, before: list[int], after: list[int]) -> tuple[float, bool]:
    logits = lm.model.logits(lm.model(torch.tensor([before + after[:-1]])))[0, len(before) - 1 :].double()
    picked = logits.log_softmax(-1).gather(1, torch.tensor(after)[:, None])
    return float(picked.sum()), logits.argmax(-1).tolist() == after


def test_loglikelihoods_equal_single_ones_by_hand(lm: LanguageModel) -> None:
    scorer = LocalScorer(lm, batch_tokens=64)
    found = scorer.loglikelihood(PAIRS)
    for pair, one in zip(PAIRS, found, strict=True):
        before, after = scorer.split(*pair)
        logprob, greedy = by_hand(lm, before, after)
        assert one.logprob == pytest.approx(logprob, rel=1e-5)
        assert (one.is_greedy, one.n_tokens) == (greedy, len(after))
        alone = scorer.loglikelihood([pair])[0]
        assert (alone.is_greedy, alone.n_tokens) == (one.is_greedy, one.n_tokens)
        assert alone.logprob == pytest.approx(one.logprob, rel=1e-5)


def test_what_greedy_decoding_gives_is_greedy(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    scorer = LocalScorer(lm)
    (answer,) = lm.generate(["The cat"], max_new_tokens=6)
    before = tokenizer.encode_prompt("The cat")
    other = (answer.ids[1] + 1) % tokenizer.vocab_size
    windows = [
        _Window(number, [*before, *ids], len(before)) for number, ids in enumerate((answer.ids, [answer.ids[0], other]))
    ]
    assert [one.is_greedy for one in scorer._score(windows, 2)] == [True, False]


def test_the_border_is_the_harness_s(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    """As `TemplateLM._encode_pair` of lm-evaluation-harness has it, worked out here by its rules."""
    scorer = LocalScorer(lm)
    begin = [tokenizer.bos_id]
    # Spaces at the context's end belong to the continuation: both ways of writing it are one question.
    assert scorer.split("The cat sat on ", "the mat") == scorer.split("The cat sat on", " the mat")
    # The continuation is what the whole has beyond the context's own number of tokens.
    before, after = scorer.split("The c", "at")
    assert before == begin + tokenizer.encode("The c")
    assert after == (begin + tokenizer.encode("The cat"))[len(before) :]
    # Nothing before it: the beginning of a document.
    assert scorer.split("", "x") == (begin, tokenizer.encode("x"))
    assert scorer.split("  ", "x") == (begin, tokenizer.encode("  x"))


def test_loglikelihood_equals_transformers(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A folder that Transformers reads with its own model and tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = LanguageModel(build(vocab_size=tokenizer.vocab_size, context_tokens=64), tokenizer)
    lm.save(tmp_path / "m")
    peer, spell = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    pairs = [(context.rstrip(), word) for context, word in PAIRS if context and context != "The cat sat on "]
    for (context, continuation), one in zip(pairs, LocalScorer(lm).loglikelihood(pairs), strict=True):
        before, whole = spell(context)["input_ids"], spell(context + continuation)["input_ids"]
        with torch.no_grad():
            logits = peer(torch.tensor([whole])).logits[0, len(before) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(whole[len(before) :])[:, None]).sum()
        assert one.n_tokens == len(whole) - len(before) > 0
        assert one.logprob == pytest.approx(float(wanted), abs=1e-4)
        assert one.is_greedy == (logits.argmax(-1).tolist() == whole[len(before) :])


def test_a_context_that_does_not_fit_is_refused_or_cut_aloud(lm: LanguageModel, tokenizer: Tokenizer) -> None:
    long = TEXTS[4] * 4
    with pytest.raises(DataError, match=r"tokens") as caught:
        LocalScorer(lm).loglikelihood([("x", "y"), (long, " end")])
    assert caught.value.where == "pair 2" and "shorten" in str(caught.value)
    scorer = LocalScorer(lm, shorten="left")
    (found,) = scorer.loglikelihood([(long, " end")])
    before, after = scorer.split(long, " end")
    assert found.dropped_tokens == len(before) + len(after) - 1 - lm.context_tokens
    logprob, _ = by_hand(lm, before[found.dropped_tokens :], after)
    assert found.logprob == pytest.approx(logprob, rel=1e-5)
    with pytest.raises(DataError, match="tokens") as caught:
        scorer.loglikelihood([("x", long)])
    assert "never cut" in str(caught.value)
    with pytest.raises(DataError, match="no token of its own"):
        scorer.loglikelihood([("x", "")])


# -- whole texts -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def rolled(lm: LanguageModel, text: str, context: int, stride: int) -> tuple[float, int]:
    """By definition: token i is predicted from what its window holds before it; windows begin every `stride`, the last
    one at the end, and each predicts what none did before it."""
    assert lm.tokenizer is not None
    ids = [lm.tokenizer.separator_id, *lm.tokenizer.encode(text)]
    row = min(context, len(ids) - 1)
    last = len(ids) - 1 - row
    total, done = 0.0, 0
    for start in sorted({*range(0, last, min(stride, row)), last}):
        for target in range(done + 1, start + row + 1):
            logits = lm.model.logits(lm.model(torch.tensor([ids[start:target]])))[0, -1].double()
            total += float(logits.log_softmax(-1)[ids[target]])
            done = target
    assert done == len(ids) - 1
    return total, done


@pytest.mark.parametrize(("context", "stride"), [(128, None), (16, None), (16, 5), (16, 1), (7, 3)])
def test_rolling_equals_the_naive_windows(lm: LanguageModel, context: int, stride: int | None) -> None:
    scorer = LocalScorer(lm, context_tokens=context, stride_tokens=stride, batch_tokens=100)
    found = scorer.rolling([*TEXTS, ""])
    for text, one in zip(TEXTS, found[:-1], strict=True):
        total, tokens = rolled(lm, text, context, stride or context)
        assert one.n_tokens == tokens
        assert one.logprob == pytest.approx(total, rel=1e-5)
        assert scorer.rolling([text])[0].logprob == pytest.approx(one.logprob, rel=1e-5)
    assert (found[-1].logprob, found[-1].n_tokens) == (0.0, 0)


def test_rolling_and_held_out_agree(lm: LanguageModel, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """One document: held-out text and a rolled text are the same windows."""
    text = TEXTS[4]
    (found,) = LocalScorer(lm, context_tokens=16).rolling([text])
    report = held_out(lm.model, write(tmp_path / "s", tokenizer, [text]), context_tokens=16, rows=3)
    assert -found.logprob / found.n_tokens == pytest.approx(report.loss, rel=1e-6)


def test_a_scorer_generates(lm: LanguageModel) -> None:
    sampling = Sampling(max_new_tokens=5)
    assert LocalScorer(lm).generate(["The", "x"], sampling) == lm.generate(["The", "x"], sampling)


def test_a_scorer_needs_a_tokenizer_and_a_window(lm: LanguageModel) -> None:
    with pytest.raises(ArtifactError, match="no tokenizer"):
        LocalScorer(LanguageModel(lm.model))
    with pytest.raises(ConfigError, match="context_tokens is 129"):
        LocalScorer(lm, context_tokens=129)
    with pytest.raises(ConfigError, match="stride_tokens is 17"):
        LocalScorer(lm, context_tokens=16, stride_tokens=17)


# -- pairs in a file -------------------------------------------------------------------------------------------------


def test_pairs_of_a_file(lm: LanguageModel, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"context": "The cat", "continuation": " sat"}\n\n{"context": "", "continuation": "x", "more": 1}\n',
        encoding="utf-8",
    )
    pairs = read_pairs(path)
    assert [pair.place for pair in pairs] == [f"{path}:1", f"{path}:3"]
    report = score_pairs(LocalScorer(lm), pairs).as_dict()
    found = LocalScorer(lm).loglikelihood([("The cat", " sat"), ("", "x")])
    assert report["n_pairs"] == 2 and report["n_tokens"] == sum(one.n_tokens for one in found)
    assert report["loglikelihood"] == pytest.approx(sum(one.logprob for one in found) / 2)
    assert report["loss"] == pytest.approx(-sum(one.logprob for one in found) / report["n_tokens"])
    low, high = report["interval"]
    assert low < report["loss"] < high


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b'{"context": "a", "continuation": "b"}\n{oops\n', 2, "not readable as JSON"),
        (b'{"context": "a"}\n', 1, "no text under 'continuation'"),
        (b'["a", "b"]\n', 1, "no text under 'context'"),
        (b'{"context": "a", "continuation": "\xff"}\n', 1, "not UTF-8"),
    ],
)
def test_bad_pairs_are_named_by_line(tmp_path: Path, content: bytes, line: int, words: str) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_pairs(path)
    assert caught.value.where == f"{path}:{line}"


def test_a_file_without_pairs_and_no_file(tmp_path: Path, lm: LanguageModel) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="holds no pair"):
        read_pairs(tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="no such file"):
        read_pairs(tmp_path / "none.jsonl")
    (tmp_path / "long.jsonl").write_text('{"context": "a", "continuation": ""}\n')
    with pytest.raises(DataError, match="no token of its own") as caught:
        score_pairs(LocalScorer(lm), read_pairs(tmp_path / "long.jsonl"))
    assert caught.value.where == f"{tmp_path / 'long.jsonl'}:1"
