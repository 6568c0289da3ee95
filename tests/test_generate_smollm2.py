"""The real SmolLM2-135M-Instruct: greedy output is Transformers', token for token, with the C step and without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ratoon.generate import native
from ratoon.generate.decode import Kernel, generate
from ratoon.generate.lm import LanguageModel, load
from ratoon.generate.rows import Generated
from ratoon.generate.sample import Sampling

pytestmark = pytest.mark.slow

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "Three things to check before a long journey:\n1.",
    "The difference between a virus and a bacterium is that",
    "从前有一座山，山里有一座庙，",
    "北京是中国的首都，",
    "如何学习一门新的语言？",
    "今天天气很好，我们去",
    "Dear Sir or Madam,\n\nI am writing to",
)
TOKENS = 200


@pytest.fixture(scope="module")
def lm(smollm2_path: Path) -> LanguageModel:
    return load(smollm2_path, device="cpu")


@pytest.fixture(scope="module")
def prompts(lm: LanguageModel) -> list[list[int]]:
    return [lm.encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def theirs(lm: LanguageModel, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What Transformers generates in float32 from the folder that we write; all prompts at once, padded on the left."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    lm.save(folder)
    peer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longest = max(map(len, prompts))
    end = lm.eos_ids[0]
    rows = torch.tensor([[end] * (longest - len(ids)) + ids for ids in prompts])
    seen = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    with torch.no_grad():
        made = peer.generate(
            rows,
            attention_mask=seen,
            max_new_tokens=TOKENS,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            eos_token_id=list(lm.eos_ids),
            pad_token_id=end,
        )
    found = []
    for ids in made[:, longest:].tolist():
        stop = next((at for at, id in enumerate(ids) if id in lm.eos_ids), len(ids) - 1)
        found.append(ids[: stop + 1])
    return found


def same(lm: LanguageModel, prompts: list[list[int]], found: list[Generated], theirs: list[list[int]]) -> None:
    for text, prompt, ours, wanted in zip(PROMPTS, prompts, found, theirs, strict=True):
        if ours.ids == wanted:
            continue
        at = next(i for i, pair in enumerate(zip(ours.ids, wanted, strict=False)) if pair[0] != pair[1])
        scores = lm.logits([[*prompt, *wanted[:at]]])[0, -1]
        apart = float(scores[wanted[at]] - scores[ours.ids[at]])
        pytest.fail(f"{text!r}: token {at} is {ours.ids[at]}, Transformers' {wanted[at]} (scores {apart:.2e} apart)")


def test_the_prompts_say_something(theirs: list[list[int]]) -> None:
    assert len(theirs) == 10 and sum(len(ids) == TOKENS for ids in theirs) >= 6
    assert len({tuple(ids) for ids in theirs}) == 10


def test_greedy_equals_transformers_token_for_token(
    lm: LanguageModel, prompts: list[list[int]], theirs: list[list[int]]
) -> None:
    """Through the C step where there is one: each prompt alone."""
    same(lm, prompts, [answer(lm, ids, "auto") for ids in prompts], theirs)


def test_the_c_step_is_what_was_tested(lm: LanguageModel, prompts: list[list[int]]) -> None:
    try:
        native.kernel()
    except native.Unavailable as error:
        pytest.skip(f"no C step on this machine: {error}")
    assert native.why_not(lm.model) is None
    assert answer(lm, prompts[0], "native").ids == answer(lm, prompts[0], "torch").ids


def test_without_the_c_step_and_in_one_batch_too(
    lm: LanguageModel, prompts: list[list[int]], theirs: list[list[int]]
) -> None:
    sampling = Sampling(max_new_tokens=TOKENS)
    same(lm, prompts, generate(lm.model, prompts, sampling, eos_ids=lm.eos_ids, kernel="torch"), theirs)


def answer(lm: LanguageModel, ids: list[int], kernel: Kernel) -> Generated:
    return generate(lm.model, [ids], Sampling(max_new_tokens=TOKENS), eos_ids=lm.eos_ids, kernel=kernel)[0]
