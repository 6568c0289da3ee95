"""Attention and the MLP: cached = uncached, masks against brute force, encoders and decoders against torch's own."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import little
from ratoon.base.seeds import stream
from ratoon.model.attention import PLAIN_LIMIT_TOKENS, QUERY_BLOCK_TOKENS, attend, visible
from ratoon.model.balance import balance_loss
from ratoon.model.cache import Cache
from ratoon.model.config import ModelConfig, MoE
from ratoon.model.encoder_decoder import EncoderDecoder
from ratoon.model.init import init_weights
from ratoon.model.transformer import Experts, Transformer
from theirs import randomize

VOCAB = little.VOCAB

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "no-groups": {"kv_heads": None},
    "windows": {"windows": (3, None)},
    "window-everywhere": {"windows": (4, 4)},
    "learned": {"positions": "learned", "norm": "layer", "mlp": "gelu_tanh"},
    "no-positions": {"positions": "none"},
    "nanochat": {
        "norm_weight": "none",
        "embedding_norm": True,
        "qk_norm": "after_rope",
        "rope_sign": -1,
        "mlp": "relu2",
    },
    "gemma": {
        "norm_weight": "plus_one",
        "norm_layout": "sandwich",
        "qk_norm": "before_rope",
        "mlp": "geglu_tanh",
        "windows": (3, None),
        "rope_local_theta": 100.0,
        "embedding_scale": 5.0,
    },
    "neox": {"norm": "layer", "norm_layout": "parallel", "rope_fraction": 0.5, "mlp": "gelu", "kv_heads": None},
    "softcap": {"attention_softcap": 1.5, "logit_softcap": 2.0},
    "experts": {"moe": little.EXPERTS},
}


def make(**changes: Any) -> Transformer:
    """A little model in evaluation mode, every parameter random."""
    model = Transformer(little.config(**changes)).eval()
    randomize(model)
    return model


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def close(one: Tensor, other: Tensor, limit: float = 2e-5) -> bool:
    assert one.shape == other.shape
    assert float(one.std()) > 0.1
    return float((one - other).abs().max()) < limit


# -- the cache ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_cache_at_every_cut(name: str) -> None:
    """Reading up to a cut, then the rest at once or one by one, gives what one call gives."""
    model, ids_BT = make(**VARIANTS[name]), ids_of(2, 11)
    whole = model.logits(model(ids_BT))
    for cut in range(1, 11):
        for step in (1, 3, 11):
            cache = Cache(model.cfg, 2, 11)
            parts = [model(ids_BT[:, :cut], cache=cache)]
            parts += [model(ids_BT[:, at : min(at + step, 11)], cache=cache) for at in range(cut, 11, step)]
            assert close(model.logits(torch.cat(parts, dim=1)), whole), (cut, step)
            assert cache.length == 11


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_rows_of_unequal_length(name: str) -> None:
    """Rows padded on the left, read together and decoded together, equal each row alone."""
    model, lengths, more = make(**VARIANTS[name]), (3, 7, 1, 5), 4
    rows = [ids_of(1, length + more, seed)[0] for seed, length in enumerate(lengths)]
    longest = max(lengths)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    document_BT = torch.full((len(rows), longest), -1, dtype=torch.int32)
    position_BT = torch.zeros(len(rows), longest, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids_BT[row, longest - length :] = rows[row][:length]
        document_BT[row, longest - length :] = 0
        position_BT[row, longest - length :] = torch.arange(length)
    cache = Cache(model.cfg, len(rows), longest + more)
    found = [model(ids_BT, position_BT, document_BT, cache)]
    for extra in range(more):
        next_ids = torch.stack([rows[row][length + extra] for row, length in enumerate(lengths)])[:, None]
        place = torch.tensor(lengths)[:, None] + extra
        found.append(model(next_ids, place, torch.zeros(len(rows), 1, dtype=torch.int32), cache))
    together = model.logits(torch.cat(found, dim=1))
    for row, length in enumerate(lengths):
        alone = model.logits(model(rows[row][None]))
        assert close(together[row : row + 1, longest - length :], alone), (row, length)
    assert not together.isnan().any()


@torch.no_grad()
def test_rewind_and_reorder() -> None:
    """Forgetting slots and copying rows of a cache leave what reading from the start would give."""
    model, ids_BT = make(), ids_of(3, 9)
    cache = Cache(model.cfg, 3, 9)
    model(ids_BT[:, :7], cache=cache)
    cache.rewind(4)
    rows = torch.tensor([2, 2, 0])
    cache.reorder(rows)
    wanted = model(torch.cat([ids_BT[rows, :4], ids_BT[:, 4:]], dim=1))[:, 4:]
    assert close(model(ids_BT[:, 4:], cache=cache), wanted)


# -- masks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [13, QUERY_BLOCK_TOKENS + 41, PLAIN_LIMIT_TOKENS + 30])
@pytest.mark.parametrize("name", ["llama", "windows", "learned", "gemma", "softcap", "experts"])
@torch.no_grad()
def test_documents_are_separate(name: str, tokens: int) -> None:
    """Documents side by side in a row give what each gives alone: in one block, in several, and in the flash kernel."""
    model = make(**VARIANTS[name], context_tokens=tokens)
    ids_BT = ids_of(2, tokens)
    cuts = [[0, tokens // 3, tokens // 3 + 1, tokens], [0, tokens // 2, tokens]]
    document_BT, position_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
    for row, places in enumerate(cuts):
        for number, (start, stop) in enumerate(itertools.pairwise(places)):
            document_BT[row, start:stop] = number
            position_BT[row, start:stop] = torch.arange(stop - start)
    together = model.logits(model(ids_BT, position_BT, document_BT))
    for row, places in enumerate(cuts):
        for start, stop in itertools.pairwise(places):
            alone = model.logits(model(ids_BT[row : row + 1, start:stop]))
            assert float((together[row : row + 1, start:stop] - alone).abs().max()) < 5e-5, (row, start)
    assert not close(together, model.logits(model(ids_BT)))


def brute_force(q: Tensor, k: Tensor, v: Tensor, see: Any, scale: float, softcap: float | None = None) -> Tensor:
    """softmax(scale q k) v for one query after the other, in float64; `see(b, t, s)` says what is visible."""
    B, H, T, C = q.shape
    K, S = k.shape[1], k.shape[2]
    out = torch.zeros(B, H, T, C, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            group = h // (H // K)
            for t in range(T):
                keys = [s for s in range(S) if see(b, t, s)]
                scores = torch.stack([q[b, h, t].double() @ k[b, group, s].double() * scale for s in keys])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                out[b, h, t] = scores.softmax(0) @ v[b, group, keys].double()
    return out


@pytest.mark.parametrize(("causal", "queries"), [(True, 9), (True, 4), (True, 1), (False, 9)])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("documents", [False, True])
def test_attend_against_brute_force(
    causal: bool, window: int | None, softcap: float | None, queries: int, documents: bool
) -> None:
    """Every kind of mask: the last `queries` slots of 9, over grouped heads."""
    keys, generator = 9, torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, queries, 6, generator=generator)
    k, v = (torch.randn(2, 2, keys, 6, generator=generator) for _ in range(2))
    document_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0] * 9]) if documents else None
    offset = keys - queries
    keep = visible(
        None if document_BS is None else document_BS[:, offset:],
        document_BS,
        queries=queries,
        keys=keys,
        causal=causal,
        window=window,
        device=torch.device("cpu"),
    )

    def see(b: int, t: int, s: int) -> bool:
        distance = offset + t - s
        near = window is None or abs(distance) < window
        same = document_BS is None or bool(document_BS[b, offset + t] == document_BS[b, s])
        return near and same and (distance >= 0 or not causal)

    found = attend(q, k, v, keep_B1TS=keep, causal=causal, scale=0.7, softcap=softcap)
    assert close(found.double(), brute_force(q, k, v, see, 0.7, softcap), 1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_attend_in_blocks_and_flash(window: int | None) -> None:
    """Long rows, whose products are taken in blocks or by the flash kernel, equal the plain square."""
    for tokens in (QUERY_BLOCK_TOKENS * 2 + 5, PLAIN_LIMIT_TOKENS + 7):
        generator = torch.Generator().manual_seed(tokens)
        q = torch.randn(1, 4, tokens, 8, generator=generator)
        k, v = (torch.randn(1, 2, tokens, 8, generator=generator) for _ in range(2))
        keep = visible(None, None, queries=tokens, keys=tokens, causal=True, window=window, device=torch.device("cpu"))
        found = attend(q, k, v, keep_B1TS=keep, causal=True, scale=0.4)
        place = torch.arange(tokens)
        distance = place[:, None] - place[None, :]
        seen = (distance >= 0) & (distance < (window or tokens))
        scores = (q @ k.repeat_interleave(2, dim=1).mT * 0.4).masked_fill(~seen, -math.inf)
        assert close(found, scores.softmax(-1) @ v.repeat_interleave(2, dim=1), 1e-5)


@torch.no_grad()
def test_window_reaches_no_further() -> None:
    """A token outside every window changes nothing; one inside does."""
    model, ids_BT = make(windows=(3, 3)), ids_of(1, 12)
    other = ids_BT.clone()
    other[0, 0] = (other[0, 0] + 1) % VOCAB
    one, two = model(ids_BT), model(other)
    # Two layers of windows of 3 keys see 4 tokens back.
    assert torch.equal(one[:, 5:], two[:, 5:])
    assert not torch.allclose(one[:, 4], two[:, 4])


# -- encoders, decoders, cross attention: torch's own layers -----------------------------------------------------------

TORCH_LIKE: dict[str, Any] = {
    "norm": "layer",
    "mlp": "gelu",
    "mlp_bias": True,
    "qkv_bias": True,
    "out_bias": True,
    "kv_heads": None,
    "positions": "learned",
}


def _copy_attention(ours: Any, theirs: nn.MultiheadAttention) -> None:
    theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.k.weight, ours.v.weight])
    theirs.in_proj_bias.data = torch.cat([ours.q.bias, ours.k.bias, ours.v.bias])
    theirs.out_proj.load_state_dict(ours.o.state_dict())


def _copy_mlp(block: Any, theirs: Any) -> None:
    theirs.linear1.load_state_dict(block.mlp.up.state_dict())
    theirs.linear2.load_state_dict(block.mlp.down.state_dict())


def _start(model: Transformer, ids_BT: Tensor) -> Tensor:
    assert model.place is not None
    return model.embed(ids_BT) + model.place.weight[: ids_BT.shape[1]]


@torch.no_grad()
def test_encoder_against_torch() -> None:
    """Bidirectional attention with padding equals `nn.TransformerEncoder` with the same weights."""
    ours, ids_BT = make(**TORCH_LIKE, causal=False), ids_of(3, 10)
    cfg = ours.cfg
    document_BT = torch.zeros_like(ids_BT)
    document_BT[1, 7:] = -1
    document_BT[2, 4:] = -1
    layer = nn.TransformerEncoderLayer(
        cfg.width, cfg.heads, cfg.mlp_width, 0.0, "gelu", cfg.norm_eps, batch_first=True, norm_first=True
    )
    theirs = nn.TransformerEncoder(layer, cfg.layers, enable_nested_tensor=False).eval()
    for block, other in zip(ours.layers, theirs.layers, strict=True):
        _copy_attention(block.attention, other.self_attn)
        _copy_mlp(block, other)
        other.norm1.load_state_dict(block.attention_norm.state_dict())
        other.norm2.load_state_dict(block.mlp_norm.state_dict())
    wanted = ours.final_norm(theirs(_start(ours, ids_BT), src_key_padding_mask=document_BT < 0))
    found, real = ours(ids_BT, document_BT=document_BT), document_BT >= 0
    assert close(found[real], wanted[real])
    assert not close(found[real], Transformer.forward(_causal(ours), ids_BT, document_BT=document_BT)[real])


def _causal(model: Transformer) -> Transformer:
    other = Transformer(model.cfg.model_copy(update={"causal": True})).eval()
    other.load_state_dict(model.state_dict())
    return other


def _encoder_decoder() -> EncoderDecoder:
    model = EncoderDecoder(
        little.config(**TORCH_LIKE, causal=False), little.config(**TORCH_LIKE, cross_attention=True)
    ).eval()
    randomize(model)
    return model


@torch.no_grad()
def test_cross_attention_against_torch() -> None:
    """A decoder over an encoder's output, sources padded, equals `nn.TransformerDecoder` with the same weights."""
    model = _encoder_decoder()
    ours, cfg = model.decoder, model.decoder.cfg
    source_BS, ids_BT = ids_of(3, 10, 1), ids_of(3, 6, 2)
    source_document_BS = torch.zeros_like(source_BS)
    source_document_BS[1, 7:] = -1
    source_document_BS[2, 3:] = -1
    layer = nn.TransformerDecoderLayer(
        cfg.width, cfg.heads, cfg.mlp_width, 0.0, "gelu", cfg.norm_eps, batch_first=True, norm_first=True
    )
    theirs = nn.TransformerDecoder(layer, cfg.layers).eval()
    for block, other in zip(ours.layers, theirs.layers, strict=True):
        _copy_attention(block.attention, other.self_attn)
        _copy_attention(block.cross, other.multihead_attn)
        _copy_mlp(block, other)
        other.norm1.load_state_dict(block.attention_norm.state_dict())
        other.norm2.load_state_dict(block.cross_norm.state_dict())
        other.norm3.load_state_dict(block.mlp_norm.state_dict())
    memory = model.encode(source_BS, source_document_BS)
    mask = nn.Transformer.generate_square_subsequent_mask(6)
    wanted = ours.final_norm(
        theirs(_start(ours, ids_BT), memory, tgt_mask=mask, memory_key_padding_mask=source_document_BS < 0)
    )
    found = model(ids_BT, source_BS, source_document_BS=source_document_BS)
    assert close(found, wanted)
    assert model.encoder.embed is model.decoder.embed


@torch.no_grad()
def test_cross_attention_with_a_cache() -> None:
    """Decoding step by step keeps the encoder's keys and values, and equals one call."""
    model = _encoder_decoder()
    source_BS, ids_BT = ids_of(2, 8, 1), ids_of(2, 7, 2)
    whole = model(ids_BT, source_BS)
    memory, cache = model.encode(source_BS), Cache(model.decoder.cfg, 2, 7)
    parts = [model.decoder(ids_BT[:, :1], cache=cache, memory_BSD=memory)]
    parts += [model.decoder(ids_BT[:, at : at + 1], cache=cache) for at in range(1, 7)]
    assert close(torch.cat(parts, dim=1), whole)


PAD, BEGIN, END, LETTERS, SHORTEST, LONGEST = 0, 1, 2, 8, 3, 7


def _strings(rows: int, seed: int) -> list[tuple[int, ...]]:
    random = stream(seed, "strings")
    lengths = random.integers(SHORTEST, LONGEST + 1, rows)
    return [tuple((random.integers(0, LETTERS, length) + 3).tolist()) for length in lengths]


def _pack(rows: list[tuple[int, ...]]) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows])


@pytest.mark.timeout(120)
def test_encoder_decoder_learns_to_reverse() -> None:
    """A small encoder-decoder, trained for seconds on strings of 3 to 7 letters, reverses strings it never saw."""
    shape: dict[str, Any] = {
        "vocab_size": LETTERS + 3,
        "width": 64,
        "layers": 2,
        "heads": 4,
        "mlp_width": 128,
        "context_tokens": LONGEST + 2,
        "positions": "learned",
        "mlp": "relu2",
    }
    model = EncoderDecoder(ModelConfig(**shape, causal=False), ModelConfig(**shape, cross_attention=True))
    init_weights(model, seed=1)
    held_out = sorted(set(_strings(200, seed=99)))
    secret = set(held_out)
    steps, peak = 500, 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(steps):
        rows = [row for row in _strings(64, seed=1000 + step) if row not in secret]
        source_BS, target_BT = _pack(rows), _pack([(BEGIN, *row[::-1], END) for row in rows])
        hidden = model(target_BT[:, :-1], source_BS, source_document_BS=torch.where(source_BS == PAD, -1, 0))
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), target_BT[:, 1:].flatten(), ignore_index=PAD)
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50, 2 * (steps - step) / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    source_BS = _pack(held_out)
    document_BS = torch.where(source_BS == PAD, -1, 0)
    with torch.no_grad():
        memory, cache = model.encode(source_BS, document_BS), Cache(model.decoder.cfg, len(held_out), LONGEST + 2)
        ids = torch.full((len(held_out), 1), BEGIN)
        written = []
        for _ in range(LONGEST + 1):
            hidden = model.decoder(ids, cache=cache, memory_BSD=memory, memory_document_BS=document_BS)
            ids = model.logits(hidden).argmax(-1)
            written.append(ids)
    answers = [tuple(row) for row in torch.cat(written, dim=1).tolist()]
    right = sum(answer[: len(row) + 1] == (*row[::-1], END) for row, answer in zip(held_out, answers, strict=True))
    assert right == len(held_out), f"{right} of {len(held_out)}, loss {float(loss.detach()):.4f}"


# -- mixtures of experts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("mlp", ["swiglu", "relu2"])
@torch.no_grad()
def test_experts_against_a_loop(normalize: bool, mlp: str) -> None:
    """Each token by itself: the k likeliest experts, their outputs weighted by the router's probabilities."""
    moe = MoE(experts=5, experts_per_token=2, expert_width=12, normalize_weights=normalize)
    layer = Experts(little.config(moe=moe, mlp=mlp))
    randomize(layer)
    x_BTD = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    found, router = layer(x_BTD)
    wanted = torch.zeros_like(x_BTD)
    for b in range(2):
        for t in range(7):
            x = x_BTD[b, t]
            probabilities = (layer.router.weight @ x).softmax(0)
            best = sorted(range(5), key=lambda e: -float(probabilities[e]))[:2]
            total = sum(float(probabilities[e]) for e in best) if normalize else 1.0
            for e in best:
                hidden = layer.up[e] @ x
                if layer.gate is not None:
                    hidden = F.silu(layer.gate[e] @ x) * hidden
                else:
                    hidden = F.relu(hidden) ** 2
                wanted[b, t] += float(probabilities[e]) / total * (layer.down[e] @ hidden)
    assert close(found, wanted, 1e-4)
    assert router is not None
    assert torch.allclose(router, x_BTD @ layer.router.weight.t(), atol=1e-5)


def test_experts_that_nobody_chose_get_no_gradient() -> None:
    """Routing is sparse: only chosen experts compute."""
    layer = Experts(little.config(moe=MoE(experts=4, experts_per_token=1, expert_width=12)))
    randomize(layer)
    out, router = layer(torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(2)))
    assert router is not None
    chosen = set(router.argmax(-1).flatten().tolist())
    out.sum().backward()
    assert layer.up.grad is not None
    for expert in range(4):
        assert bool(layer.up.grad[expert].any()) == (expert in chosen)


def test_balance_loss_formula() -> None:
    """E Σ f p per row, against a loop, against Transformers', and 1 x k where everything is even."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    router = torch.randn(3, 11, 6, generator=torch.Generator().manual_seed(0))
    keep = torch.ones(3, 11)
    keep[1, 7:] = 0
    keep[2, 1:] = 0
    found = balance_loss(router, 2, keep)
    for row in range(3):
        tokens = int(keep[row].sum())
        share, mean = [0.0] * 6, [0.0] * 6
        for t in range(tokens):
            probabilities = router[row, t].softmax(0).tolist()
            for expert in sorted(range(6), key=lambda e: -probabilities[e])[:2]:
                share[expert] += 1 / tokens
            for expert in range(6):
                mean[expert] += probabilities[expert] / tokens
        wanted = 6 * sum(f * p for f, p in zip(share, mean, strict=True))
        assert float(found[row]) == pytest.approx(wanted, rel=1e-5)
        theirs = load_balancing_loss_func((router[row],), 6, 2, attention_mask=keep[row : row + 1])
        assert float(found[row]) == pytest.approx(float(theirs), rel=1e-5)
    assert torch.equal(balance_loss(router, 2), balance_loss(router, 2, torch.ones(3, 11)))
    even = torch.eye(4)[None] * 100.0  # each of four tokens surely chooses an expert of its own
    assert float(balance_loss(even, 1)) == pytest.approx(1.0)
    assert float(balance_loss(even[:, :1].repeat(1, 4, 1), 1)) == pytest.approx(4.0)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    """Gradient checkpointing changes memory, not numbers."""
    gradients = []
    for recompute in (False, True):
        model = little.model().train()
        model.recompute_blocks = recompute
        model(ids_of(2, 9)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert little.same(*gradients)
    assert len(gradients[0]) > 10
