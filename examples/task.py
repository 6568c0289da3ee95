"""A task in forty lines: records -> tokens and what to learn from them -> rows -> the one loop.

A made-up task: answer with the word turned round. Only the answer is learned; the packer lets examples share rows, and
attention never crosses from one to the next.
"""

from __future__ import annotations

import numpy as np

from ratoon.base.seeds import stream
from ratoon.data.batch import Batch
from ratoon.data.pack import Example, pack_whole, whole_rows
from ratoon.generate.lm import LanguageModel
from ratoon.model.config import ModelConfig
from ratoon.model.init import init_weights
from ratoon.model.transformer import Transformer
from ratoon.text.tokenizer import Tokenizer
from ratoon.train.loop import train
from ratoon.train.settings import TrainSettings

ROW_TOKENS, ROWS, STEPS = 64, 16, 300
TOKENIZER = Tokenizer.bytes_only()


def example(word: str) -> Example:
    """`word>drow.`: what stands before the answer has weight 0."""
    question, answer = TOKENIZER.encode(f"{word}>"), TOKENIZER.encode(f"{word[::-1]}.")
    weight = [0.0] * (len(question) - 1) + [1.0] * len(answer)  # weight[i]: predicting token i + 1
    return Example([*question, *answer], weight, name=word)


class Words:
    """A source of batches: a function of the step alone, so that a resumed run sees what it would have seen."""

    def batch(self, step: int) -> Batch:
        random = stream(1, "words", step)
        examples = [example("".join(random.choice(list("abc"), 2))) for _ in range(4 * ROWS)]
        return whole_rows(examples, pack_whole(examples, ROW_TOKENS)[:ROWS], ROW_TOKENS)

    def state(self) -> dict[str, int]:
        return {"seed": 1}


def main() -> float:
    """Train, let the model answer, and return the share of right answers."""
    shape = {"width": 64, "layers": 2, "heads": 4, "mlp_width": 128, "context_tokens": ROW_TOKENS}
    model = Transformer(ModelConfig(vocab_size=TOKENIZER.vocab_size, **shape))
    init_weights(model, 1)
    train(model, Words(), TrainSettings(steps=STEPS, rows=ROWS, context_tokens=ROW_TOKENS, compile="off"))
    lm = LanguageModel(model, TOKENIZER)
    words = [a + b for a in "abc" for b in "abc"]
    answers = lm.generate([TOKENIZER.encode(f"{word}>") for word in words], max_new_tokens=3, temperature=0.0)
    right = [answer.text == f"{word[::-1]}." for word, answer in zip(words, answers, strict=True)]
    print(f"{sum(right)} of {len(words)} answers are right")
    return float(np.mean(right))


if __name__ == "__main__":
    main()
