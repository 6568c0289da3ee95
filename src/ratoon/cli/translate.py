"""A new encoder-decoder for `ratoon finetune`: its tokenizer, its shape, its first weights.

Decides whose tokenizer it reads with, and that the rows' sources and answers are what a new one is trained on. What a
source is, is the task's; the model's shape is `model.config.EncoderDecoderSettings`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ratoon.data.records import Parts
    from ratoon.generate.translate import Translator
    from ratoon.recipe.tuning import TuneRecipe
    from ratoon.store.artifact import Parent
    from ratoon.store.runs import Run
    from ratoon.text.tokenizer import Tokenizer


def new_model(
    recipe: TuneRecipe, run: Run, talk: Callable[[str], None], rows: Parts
) -> tuple[Translator, list[Parent]]:
    """An encoder-decoder with first weights from the recipe's seed, and what it is made from: its tokenizer.

    Raises `ConfigError` for settings that do not fit, `ArtifactError` for a tokenizer without a token that ends a text.
    """
    from ratoon.base.settings import build, merge
    from ratoon.generate.translate import Translator
    from ratoon.model.config import EncoderDecoderSettings
    from ratoon.model.encoder_decoder import new_encoder_decoder
    from ratoon.model.init import init_weights
    from ratoon.store.artifact import Parent
    from ratoon.tasks.answered import begin_of_answer
    from ratoon.tasks.parts import end_of_text

    tokenizer = _tokenizer(recipe, run, talk, rows)
    table = merge(recipe.model.settings, {})
    row_tokens = recipe.train.get("context_tokens")
    if row_tokens is not None:
        table.setdefault("context_tokens", row_tokens)
    settings = build(EncoderDecoderSettings, table, where=recipe._where, within="model.settings")
    model = new_encoder_decoder(
        settings,
        tokenizer.vocab_size,
        bos_id=begin_of_answer(tokenizer),
        eos_ids=(end_of_text(tokenizer),),
        pad_id=tokenizer.pad_id,
    )
    init_weights(model, recipe.seed)
    talk(
        f"a new encoder-decoder: {settings.encoder_layers} + {settings.decoder_layers} layers, {settings.width} wide, "
        f"{tokenizer.vocab_size:,} tokens"
    )
    return Translator(model, tokenizer, recipe.name), [Parent(kind="tokenizer", hash=tokenizer.hash)]


def _tokenizer(recipe: TuneRecipe, run: Run, talk: Callable[[str], None], rows: Parts) -> Tokenizer:
    """The tokenizer that the recipe names; else one that is trained on the training rows, kept in the run's folder and
    read from there when the run goes on."""
    from ratoon.cli.tokenizer import tokenizer_of
    from ratoon.store.atomic import atomic_folder
    from ratoon.text.tokenizer import Tokenizer
    from ratoon.train.device import World

    if recipe.model.tokenizer is not None:
        return tokenizer_of(recipe.model.tokenizer)
    folder, world = run.folder / "tokenizer", World()
    if world.first and not (folder / "tokenizer.json").is_file():
        found = Tokenizer.train(_texts(rows.train), vocab_size=recipe.model.vocab_size)
        with atomic_folder(folder, replace=True) as partial:
            for name, content in found.files().items():
                (partial / name).write_bytes(content)
        talk(f"trained a tokenizer of {found.vocab_size:,} tokens on the sources and answers of the training rows")
    world.wait()
    return Tokenizer.load(folder)


def _texts(records: list[Any]) -> Iterator[str]:
    """Everything that is read and written in the records."""
    for record in records:
        yield from record.values.values()
        yield from record.answers
