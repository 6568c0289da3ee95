"""The encoder-decoder: its mathematics, the one loop, the one decoding, and the disk.

Attention against torch's own layers, with learned positions and layer norm, is `test_model_attention.py`'s; here the
settings of `new_encoder_decoder` stand against a reference written from `torch.nn.functional` alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import little
from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.base.seeds import stream
from ratoon.data.batch import Batch
from ratoon.data.pack import pack_whole, whole_rows
from ratoon.generate.beam import length_norm
from ratoon.generate.decode import generate
from ratoon.generate.lm import load
from ratoon.generate.sample import Sampling
from ratoon.generate.translate import Translator
from ratoon.model import fused
from ratoon.model.config import EncoderDecoderSettings
from ratoon.model.encoder_decoder import EncoderDecoder, new_encoder_decoder
from ratoon.model.folder import is_encoder_decoder, read_encoder_decoder, read_model, write_model
from ratoon.tasks.contract import Question
from ratoon.tasks.example import Example
from ratoon.text.tokenizer import Tokenizer
from ratoon.train.loss import Inputs, sequence_to_sequence

PAD, BEGIN, END, VOCAB = 0, 1, 2, 13
SHAPE: dict[str, Any] = {
    "encoder_layers": 2,
    "decoder_layers": 3,
    "width": 32,
    "heads": 2,
    "mlp_width": 48,
    "context_tokens": 32,
    "dropout": 0.0,
}


def build(seed: int = 1, vocab: int = VOCAB, begin: int = BEGIN, end: int = END, **changes: Any) -> EncoderDecoder:
    """A little encoder-decoder, every parameter random: gains and output projections too."""
    made = new_encoder_decoder(
        EncoderDecoderSettings(**(SHAPE | changes)), vocab, bos_id=begin, eos_ids=(end,), pad_id=PAD
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            spread = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(spread if parameter.ndim > 1 else 1 + spread)
    return made


def pairs(count: int, seed: int = 0, *, longest: int = 7) -> list[Example]:
    """A string and its reverse."""
    random = stream(seed, "pairs")
    found = []
    for number in range(count):
        text = (random.integers(0, VOCAB - 3, random.integers(3, longest + 1)) + 3).tolist()
        ids = [BEGIN, *text[::-1], END]
        found.append(Example(ids, [1.0] * (len(ids) - 1), f"pair:{number}", source=text))
    return found


def packed(examples: list[Example], row_tokens: int = 24) -> Batch:
    return whole_rows(examples, pack_whole(examples, row_tokens), row_tokens)


# -- mathematics -------------------------------------------------------------------------------------------------------


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def turn(x_HTC: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv:2104.09864, eq. 34), halves together, as complex numbers."""
    half = x_HTC.shape[-1] // 2
    angle = torch.arange(x_HTC.shape[1])[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    turned = torch.complex(x_HTC[..., :half], x_HTC[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def mixed(part: Any, x_TD: Tensor, other_SD: Tensor, heads: int, *, causal: bool, turned: bool) -> Tensor:
    split: Callable[[Tensor], Tensor] = lambda y: y.view(len(y), heads, -1).transpose(0, 1)  # noqa: E731
    q, k, v = split(x_TD @ part.q.weight.T), split(other_SD @ part.k.weight.T), split(other_SD @ part.v.weight.T)
    if turned:
        q, k = turn(q), turn(k)
    out_HTC = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=causal)[0]
    return out_HTC.transpose(0, 1).flatten(1) @ part.o.weight.T


def reference(model: EncoderDecoder, source: list[int], ids: list[int]) -> Tensor:
    """Scores (T, V) of a target beside its source, one pair alone, in float64."""
    eps, heads = model.cfg.norm_eps, model.cfg.heads
    double = EncoderDecoder(*model.configs, shared_embeddings=model.shared_embeddings).double()
    double.load_state_dict(model.state_dict())

    def mlp(part: Any, x: Tensor) -> Tensor:
        up = x @ part.up.weight.T
        hidden = F.relu(up) ** 2 if part.gate is None else F.silu(x @ part.gate.weight.T) * up
        return hidden @ part.down.weight.T

    memory = double.encoder.embed.weight[source]
    for block in double.encoder.layers:
        n = rms(memory, block.attention_norm.weight, eps)
        memory = memory + mixed(block.attention, n, n, heads, causal=False, turned=True)
        memory = memory + mlp(block.mlp, rms(memory, block.mlp_norm.weight, eps))
    memory = rms(memory, double.encoder.final_norm.weight, eps)
    x = double.decoder.embed.weight[ids]
    for block in double.decoder.layers:
        n = rms(x, block.attention_norm.weight, eps)
        x = x + mixed(block.attention, n, n, heads, causal=True, turned=True)
        n = rms(x, block.cross_norm.weight, eps)
        x = x + mixed(block.cross, n, memory, heads, causal=False, turned=False)
        x = x + mlp(block.mlp, rms(x, block.mlp_norm.weight, eps))
    return rms(x, double.decoder.final_norm.weight, eps) @ double.head_weight().T


def scores(model: EncoderDecoder, batch: Batch) -> Tensor:
    """Scores (B, T, V) of packed rows."""
    inputs = Inputs.of(batch, torch.device("cpu"))
    hidden = model(
        inputs.ids_BT,
        inputs.tensor("source_BS"),
        inputs.document_BT,
        inputs.tensor("source_document_BS"),
        inputs.position_BT,
    )
    return model.logits(hidden)


@pytest.mark.parametrize("changes", [{}, {"mlp": "swiglu"}, {"shared_embeddings": False}])
@torch.no_grad()
def test_pairs_packed_into_rows_equal_a_reference_of_each_alone(changes: dict[str, Any]) -> None:
    model, examples = build(**changes), pairs(9)
    rows = pack_whole(examples, 24)
    batch = whole_rows(examples, rows, 24)
    assert max(len(members) for members in rows) >= 3
    found_BTV = scores(model, batch)
    for row, members in enumerate(rows):
        for document, number in enumerate(members):
            wanted_TV = reference(model, list(examples[number].source or ()), list(examples[number].ids)[:-1])
            at = torch.from_numpy(batch.document_BT[row] == document)
            torch.testing.assert_close(found_BTV[row, at].double(), wanted_TV, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_and_other_documents_change_nothing_and_the_own_source_does() -> None:
    model, batch = build(), packed(pairs(6))
    before, own = scores(model, batch), torch.from_numpy(batch.document_BT == 0)
    source, document = batch.extra["source_BS"], batch.extra["source_document_BS"]
    assert (document == -1).any() and (document == 1).any()
    for changed, same in ((document == -1, True), (document == 1, True), (document == 0, False)):
        other = source.copy()
        other[changed] = (other[changed] + 1) % VOCAB
        after = scores(model, Batch(**{**vars(batch), "extra": {**batch.extra, "source_BS": other}}))
        assert torch.equal(after[own], before[own]) == same


def test_a_row_of_sources_without_padding_beside_a_padded_target_stays_finite() -> None:
    model = build()
    example = Example([BEGIN, 5, END], [1.0, 1.0], source=[4, 5, 6, 7, 8, 9, 10, 11])
    batch = packed([example], 8)
    assert (batch.document_BT == -1).any() and (batch.extra["source_document_BS"] == 0).all()
    loss, weight = sequence_to_sequence(model, Inputs.of(batch, torch.device("cpu")))
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight == 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    nats = -reference(model, list(example.source or ()), [BEGIN, 5]).log_softmax(-1)
    assert float(loss.detach()) == pytest.approx(float((nats[0, 5] + nats[1, END]).detach()), abs=1e-4)


def test_the_loss_is_the_weighted_sum_over_all_pairs() -> None:
    model = build()
    examples = [
        Example(e.ids, [0.5 * (place % 3) for place in range(len(e.weight))], source=e.source) for e in pairs(7)
    ]
    loss, weight = sequence_to_sequence(model, Inputs.of(packed(examples), torch.device("cpu")))
    wanted = 0.0
    for example in examples:
        nats = -reference(model, list(example.source or ()), list(example.ids)[:-1]).detach().log_softmax(-1)
        wanted += sum(w * float(nats[t, example.ids[t + 1]]) for t, w in enumerate(example.weight))
    assert float(loss) == pytest.approx(wanted, rel=1e-5)
    assert float(weight) == sum(sum(example.weight) for example in examples)


def test_sources_longer_than_the_encoder_reads_are_refused() -> None:
    model = build(context_tokens=16)
    batch = whole_rows(examples := pairs(3), pack_whole(examples, 16), 16, source_tokens=20)
    with pytest.raises(ConfigError, match="rows of 20 source tokens"):
        sequence_to_sequence(model, Inputs.of(batch, torch.device("cpu")))


@pytest.mark.skipif(not fused.usable(), reason="no C code on this machine")
@torch.no_grad()
def test_bfloat16_through_the_c_code_is_near_float32() -> None:
    model = build(width=64, mlp_width=64)
    batch = packed(pairs(8))
    own = torch.from_numpy(batch.document_BT >= 0)
    exact = scores(model, batch)[own].log_softmax(-1)
    low = scores(model.to(torch.bfloat16), batch)[own].float().log_softmax(-1)
    assert F.kl_div(low, exact, log_target=True, reduction="batchmean") < 0.02 * -(exact.exp() * exact).sum(-1).mean()


# -- decoding ----------------------------------------------------------------------------------------------------------


def sources(count: int, seed: int = 5) -> list[list[int]]:
    return [list(example.source or ()) for example in pairs(count, seed, longest=12)]


@torch.no_grad()
def naive(model: EncoderDecoder, source: list[int], tokens: int) -> tuple[list[int], list[float]]:
    """The likeliest token each time, everything read anew each time."""
    ids: list[int] = []
    logprobs = []
    while len(ids) < tokens and ids[-1:] != [END]:
        logprob_V = model.logits(model(torch.tensor([[BEGIN, *ids]]), torch.tensor([source])))[0, -1].log_softmax(-1)
        ids.append(int(logprob_V.argmax()))
        logprobs.append(float(logprob_V.max()))
    return ids, logprobs


def test_greedy_with_a_cache_and_in_a_batch_equals_the_naive_loop() -> None:
    model, many = build(), sources(9)
    made = generate(
        model, [[BEGIN]] * 9, Sampling(max_new_tokens=12), sources=many, logprobs=True, batch_rows=4, kernel="auto"
    )
    for one, source in zip(made, many, strict=True):
        ids, logprobs = naive(model, source, 12)
        assert one.ids == ids
        assert one.logprobs == pytest.approx(logprobs, abs=2e-5)
    assert len({tuple(one.ids) for one in made}) > 4
    assert len({len(source) for source in many}) > 3


def exhaustive(
    model: EncoderDecoder, source: list[int], tokens: int, rank: Callable[[float, int], float]
) -> tuple[list[int], float]:
    """The best of all targets there are: everything that ends, or is `tokens` long."""
    best: tuple[float, list[int]] = (float("-inf"), [])

    @torch.no_grad()
    def walk(ids: list[int], total: float) -> None:
        nonlocal best
        if ids and (ids[-1] == END or len(ids) == tokens):
            best = max(best, (rank(total, len(ids)), ids))
            return
        logprob_V = model.logits(model(torch.tensor([[BEGIN, *ids]]), torch.tensor([source])))[0, -1].log_softmax(-1)
        for id, logprob in enumerate(logprob_V.tolist()):
            walk([*ids, id], total + logprob)

    walk([], 0.0)
    return best[1], best[0]


@pytest.mark.parametrize(
    ("changes", "rank"),
    [
        ({"length_penalty": 0.0}, lambda total, length: total),
        ({"length_penalty": 1.0}, lambda total, length: total / length),
        ({"length_penalty": 0.6, "length_norm": "wu"}, lambda total, length: total * 6**0.6 / (5 + length) ** 0.6),
        ({"length_penalty": 9.0, "length_norm": "wu"}, lambda total, length: total * 6**9 / (5 + length) ** 9),
    ],
)
def test_wide_beams_find_what_exhaustive_search_finds(
    changes: dict[str, Any], rank: Callable[[float, int], float]
) -> None:
    model = build(vocab=5, encoder_layers=1, decoder_layers=1)
    many = [[3], [4, 3, 1], [1, 4, 4, 3, 2, 0]]
    made = generate(model, [[BEGIN]] * 3, Sampling(max_new_tokens=4, num_beams=64, **changes), sources=many)
    for one, source in zip(made, many, strict=True):
        ids, best = exhaustive(model, source, 4, rank)
        assert one.ids == ids
        assert one.score == pytest.approx(best, abs=1e-4)


def test_the_length_norm_decides_between_short_and_long() -> None:
    model = build(seed=4, vocab=6, encoder_layers=1, decoder_layers=1)
    lengths = []
    for penalty in (0.0, 0.6, 3.0):
        sampling = Sampling(max_new_tokens=8, num_beams=24, length_penalty=penalty, length_norm="wu")
        lengths.append(sum(len(one.ids) for one in generate(model, [[BEGIN]] * 6, sampling, sources=sources_of(6))))
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1], lengths
    # Eq. 14 by hand: 11 tokens at alpha 0.6.
    assert length_norm(11, Sampling(num_beams=2, length_penalty=0.6, length_norm="wu")) == pytest.approx(
        16**0.6 / 6**0.6
    )
    with pytest.raises(ValueError, match="length_norm"):
        Sampling(length_norm="wu")


def sources_of(count: int) -> list[list[int]]:
    return [[3 + (number + place) % 3 for place in range(1 + number)] for number in range(count)]


def test_narrow_beams_in_a_batch_equal_single_ones_and_are_no_worse_than_greedy() -> None:
    model, many = build(), sources(10)
    sampling = Sampling(max_new_tokens=10, num_beams=4, length_penalty=0.0)
    together = generate(model, [[BEGIN]] * 10, sampling, sources=many, logprobs=True, batch_rows=4)
    for one, source in zip(together, many, strict=True):
        alone = generate(model, [[BEGIN]], sampling, sources=[source])[0]
        assert one.ids == alone.ids
        assert one.score == pytest.approx(alone.score, abs=1e-4)
        assert one.score == pytest.approx(sum(one.logprobs or ()), abs=1e-4)
    greedy = generate(model, [[BEGIN]] * 10, Sampling(max_new_tokens=10), sources=many, logprobs=True)
    better = [(one.score or 0.0) - sum(other.logprobs or ()) for one, other in zip(together, greedy, strict=True)]
    assert min(better) > -1e-4 and max(better) > 0.01


def test_sources_that_cannot_be_read_are_refused() -> None:
    model = build()
    with pytest.raises(DataError, match="the source has 33 tokens") as caught:
        generate(model, [[BEGIN]] * 2, sources=[[3], [3] * 33])
    assert caught.value.where == "source 1"
    with pytest.raises(DataError, match="the source has 0 tokens"):
        generate(model, [[BEGIN]], sources=[[]])
    with pytest.raises(ConfigError, match="2 sources for 1 prompts"):
        generate(model, [[BEGIN]], sources=[[3], [4]])
    with pytest.raises(ConfigError, match="sources belong to an encoder-decoder"):
        generate(model, [[BEGIN]])


# -- the disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_saved_equals_loaded(tmp_path: Path, shared: bool) -> None:
    model = build(shared_embeddings=shared)
    write_model(model, tmp_path / "m", shard_bytes=20_000)
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()
    again = read_encoder_decoder(tmp_path / "m")
    assert is_encoder_decoder(tmp_path / "m") and again.configs == model.configs and not again.training
    assert little.same(dict(model.named_parameters()), dict(again.named_parameters()))
    assert (again.encoder.embed is again.decoder.embed) == shared
    batch = packed(pairs(5))
    with torch.no_grad():
        assert torch.equal(scores(again, batch), scores(model, batch))
    low = read_encoder_decoder(tmp_path / "m", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}


def test_transformers_and_our_other_reader_refuse_the_folder(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    write_model(build(), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "ratoon-encoder-decoder"
    for reader in (AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM):
        with pytest.raises(ValueError, match="ratoon-encoder-decoder"):
            reader.from_pretrained(tmp_path / "m")
    with pytest.raises(ArtifactError, match="holds an encoder-decoder"):
        read_model(tmp_path / "m")
    write_model(little.model(), tmp_path / "other")
    assert not is_encoder_decoder(tmp_path / "other")
    with pytest.raises(ArtifactError, match="the model type is 'llama'"):
        read_encoder_decoder(tmp_path / "other")


def _weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return apply


def _settings(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        table = json.loads((folder / "config.json").read_text())
        change(table)
        (folder / "config.json").write_text(json.dumps(table))

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_weights(lambda w: w.pop("decoder.layers.1.cross.k.weight")), "1 missing .*decoder.layers.1.cross.k.weight"),
        (_weights(lambda w: w.update(extra=torch.ones(1))), "1 too many .*extra"),
        (_weights(lambda w: w.update({"encoder.final_norm.weight": torch.ones(3)})), "has the shape \\(3,\\)"),
        (_settings(lambda t: t.pop("encoder")), "encoder|vocab_size"),
        (_settings(lambda t: t["decoder"].update(widht=3)), "widht"),
        (_settings(lambda t: t["encoder"].update(causal=True)), "do not fit each other"),
    ],
)
def test_a_damaged_folder_is_refused_with_its_place(tmp_path: Path, damage: Any, said: str) -> None:
    write_model(build(), tmp_path / "m")
    (tmp_path / "m" / "ratoon.json").unlink()  # the manifest would notice first
    damage(tmp_path / "m")
    with pytest.raises(ArtifactError, match=said) as caught:
        read_encoder_decoder(tmp_path / "m")
    assert str(tmp_path / "m") in str(caught.value.where)


def test_a_loaded_model_translates(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes_only()
    begin = tokenizer.separator_id
    assert begin is not None
    model = build(vocab=tokenizer.vocab_size, begin=begin, end=begin)
    made = Translator(model, tokenizer)
    assert load(made.save(tmp_path / "m")).model.configs == model.configs
    lm = load(tmp_path / "m")
    assert isinstance(lm, Translator) and not lm.can_chat and lm.begin_id == begin
    texts = ["good morning", "a"]
    answers = lm.generate(texts, max_new_tokens=6, num_beams=3, length_penalty=0.6, length_norm="wu")
    ids = [lm.encode(text) for text in texts]
    direct = generate(
        model,
        [[begin]] * 2,
        Sampling(max_new_tokens=6, num_beams=3, length_penalty=0.6, length_norm="wu"),
        sources=ids,
    )
    assert [one.ids for one in answers] == [one.ids for one in direct]
    assert [one.prompt_tokens for one in answers] == [len(source) for source in ids]
    questions = [Question([begin], source, max_new_tokens=4) for source in ids]
    greedy = lm.generate(ids, max_new_tokens=4)
    assert lm.answer(questions, Sampling(max_new_tokens=6)) == [tokenizer.decode(one.ids) for one in greedy]
    assert lm.logits([[begin, 5]], [ids[1]])[0, 0].argmax() == greedy[1].ids[0]
    with pytest.raises(ConfigError, match="beside its source"):
        lm.logits([[begin]])
    with pytest.raises(ConfigError, match="holds no conversation"):
        lm.chat([{"role": "user", "content": "hello"}])
    with pytest.raises(ConfigError, match="puts its source into the prompt"):
        lm.answer([Question([begin])], Sampling())
    long = lm.encode("y" * 8 + "x" * 32)
    with pytest.raises(DataError, match=f"the source has {len(long)} tokens"):
        lm.generate([long])
    shortened = lm.generate([long], shorten="left", max_new_tokens=3)[0]
    assert shortened.dropped_prompt_tokens == len(long) - 32
    assert shortened.ids == lm.generate([long[-32:]], max_new_tokens=3)[0].ids
