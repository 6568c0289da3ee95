"""Preference: losses, rewards and every gradient are those of TRL's trainer, on a Llama with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import theirs
from made_pairs import END, answer, batches, pairs, reference_of, summed, swapped
from ratoon.data.pack import Example
from ratoon.model.folder import read_model, write_model
from ratoon.model.transformer import Transformer
from ratoon.train.preference import margins, preference


@dataclass
class Peer:
    """TRL's trainer and our models with the same weights."""

    trainer: Any
    ours: Transformer
    reference: Transformer
    folder: Path

    def setting(self, kind: str, beta: float, smoothing: float = 0.0) -> None:
        self.trainer.loss_types, self.trainer.beta, self.trainer.label_smoothing = [kind], beta, smoothing

    def examples(self) -> list[Example]:
        """The trainer's pairs as its own tokenizing left them."""
        return [
            replace(answer(row["prompt_ids"], row["chosen_ids"]), beside=answer(row["prompt_ids"], row["rejected_ids"]))
            for row in self.trainer.train_dataset
        ]

    def compute(self, rows: Sequence[int]) -> tuple[float, dict[str, Tensor], dict[str, float]]:
        """Mean loss of some pairs, every gradient, and what TRL reports of them."""
        self.trainer.model.zero_grad()
        self.trainer._metrics["train"].clear()
        batch = self.trainer.data_collator([self.trainer.train_dataset[row] for row in rows])
        loss = self.trainer.compute_loss(self.trainer.model, batch)
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.trainer.model.named_parameters() if p.grad is not None}
        return float(loss), gradients, {name: found[-1] for name, found in self.trainer._metrics["train"].items()}

    def in_their_names(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Our gradients under Transformers' names: written as if they were weights."""
        made = Transformer(self.ours.cfg)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_(gradients[name])
        write_model(made, self.folder / "gradients", replace=True)
        return theirs.weights(theirs.load_theirs(self.folder / "gradients"))


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Peer:
    pytest.importorskip("trl")  # not for every Python that Ratoon runs on
    import transformers
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from trl import DPOConfig, DPOTrainer

    folder = tmp_path_factory.mktemp("trl")
    made = []
    for name, moved in (("policy", 0.15), ("reference", 0.0)):
        config = transformers.LlamaConfig(**(theirs.SMALL | {"eos_token_id": END, "tie_word_embeddings": False}))
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        theirs.randomize(model)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += moved * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        made.append(model)
    vocab = {str(number): number for number in range(theirs.VOCAB)}
    vocab = {"<pad>" if number == 0 else "<end>" if number == END else word: number for word, number in vocab.items()}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    texts: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
    for one in pairs(6, theirs.VOCAB):
        assert one.beside is not None
        asked = list(one.weight).index(1.0) + 1
        for name, ids in (
            ("prompt", one.ids[:asked]), ("chosen", one.ids[asked:-1]), ("rejected", one.beside.ids[asked:-1])
        ):  # fmt: skip
            texts[name].append(" " + " ".join(map(str, ids)) + (" " if name != "prompt" else ""))
    arguments = DPOConfig(
        output_dir=str(folder / "out"), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = DPOTrainer(
        made[0], ref_model=made[1], args=arguments, train_dataset=Dataset.from_dict(texts), processing_class=tokenizer
    )
    trainer.model.train()
    return Peer(trainer, read_model(folder / "policy").train(), read_model(folder / "reference"), folder)


def test_the_pairs_are_those_of_trl(peer: Peer) -> None:
    mine = [(list(one.ids), list(one.beside.ids)) for one in pairs(6, theirs.VOCAB) if one.beside]
    assert [(list(one.ids), list(one.beside.ids)) for one in peer.examples() if one.beside] == mine


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_equals_trl(peer: Peer, kind: Any, beta: float) -> None:
    examples = reference_of(peer.reference, peer.examples())
    peer.setting(kind, beta)
    loss, gradients, told = peer.compute(range(len(examples)))
    objective = preference(beta=beta, kind=kind)
    found, weight, mine = summed(peer.ours, batches(examples), objective)
    assert weight == len(examples)
    assert found / weight == pytest.approx(loss, rel=1e-5)
    scaled = peer.in_their_names({name: value / weight for name, value in mine.items()})
    assert scaled.keys() == gradients.keys()
    for name, value in gradients.items():
        assert float(value.abs().max()) > 1e-4, f"{name} has no gradient: nothing is compared"
        torch.testing.assert_close(scaled[name], value, rtol=1e-4, atol=1e-5)
    rewards = [margins(peer.ours, one, beta=beta) for one in batches(examples)]
    chosen, rejected, margin = (
        torch.cat([getattr(one, name) for one in rewards]) for name in ("chosen_P", "rejected_P", "margin_P")
    )
    right = torch.cat([one.right_P for one in rewards]).float().mean()
    assert float(chosen.mean()) == pytest.approx(told["rewards/chosen"], abs=1e-5)
    assert float(rejected.mean()) == pytest.approx(told["rewards/rejected"], abs=1e-5)
    assert float(margin.mean()) == pytest.approx(told["rewards/margins"], abs=1e-5)
    assert 0 < float(right) < 1 and float(right) == pytest.approx(told["rewards/accuracies"])
    other = reference_of(peer.reference, [swapped(one) for one in peer.examples()])
    assert abs(summed(peer.ours, batches(other), objective)[0] / weight - loss) > 0.01 * abs(loss)


def test_smoothed_equals_trl(peer: Peer) -> None:
    """TRL's `aot` sorts the pairs of a batch; of a single pair it is the smoothed loss."""
    beta, smoothing = 0.3, 0.15
    examples = reference_of(peer.reference, peer.examples())
    peer.setting("aot", beta, smoothing)
    objective = preference(beta=beta, label_smoothing=smoothing)
    for number, example in enumerate(examples):
        loss, gradients, _ = peer.compute([number])
        found, _, mine = summed(peer.ours, batches([example]), objective)
        assert found == pytest.approx(loss, rel=1e-5)
        for name, value in peer.in_their_names(mine).items():
            torch.testing.assert_close(value, gradients[name], rtol=1e-4, atol=1e-5)
