"""Task heads on disk: how a model with a head, or one that sees both ways, is written as a Hugging Face folder.

Decides the names of heads in each family, as Transformers has them, and what of a head stands in `config.json`. What
Transformers cannot compute (attention both ways, pooling) is written under a model type of our own, so that it refuses
the folder instead of reading it wrong.
"""

from __future__ import annotations

from typing import Any

from ratoon.base.errors import ArtifactError
from ratoon.model.config import HeadConfig, ModelConfig
from ratoon.model.families import FAMILIES
from ratoon.model.family import Rule
from ratoon.model.family_config import config_from_folder, config_to_folder

OWN_TYPE = "ratoon"
"""The model type of folders that Transformers must not read as one of its families."""
_STEMS = {"gemma3_text": "Gemma3Text"}
_ENDS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification", "span": "ForQuestionAnswering"}
_PROBLEMS = {"one": "single_label_classification", "several": "multi_label_classification", "number": "regression"}
_SCORE = {"sequence": "score", "token": "score", "span": "qa_outputs"}
_OTHER_SCORE = {("gpt2", "token"): "classifier", ("gpt_neox", "token"): "classifier"}
_LACKS = {"nanochat": ("sequence", "token", "span"), "gemma3_text": ("token", "span")}
"""Heads that Transformers does not have for a family."""
_SPAN_PREFIX = dict.fromkeys(("llama", "qwen2", "qwen3", "qwen3_moe"), ("model.", "transformer."))
"""Families whose question-answering models keep the trunk under another name."""


def weights_of(cfg: ModelConfig) -> tuple[Rule, ...]:
    """The rules of the family's weights, with those of a task head in place of the next token's."""
    rules = FAMILIES[cfg.family].weights
    if cfg.task_head is None:
        return rules
    kind = cfg.task_head.kind
    score = _OTHER_SCORE.get((cfg.family, kind), _SCORE[kind])
    old, new = _span_prefix(cfg) if kind == "span" else ("", "")
    trunk = tuple(
        Rule(rule.ours, _renamed(rule.theirs, old, new), rule.split, rule.join)
        for rule in rules
        if not rule.ours[0].startswith("head.")
    )
    own = [("task_head.score.weight", f"{score}.weight"), ("task_head.score.bias", f"{score}.bias")]
    return (*trunk, *(Rule((ours,), theirs) for ours, theirs in own), Rule(("task_head.query",), "pooling.query"))


def _renamed(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if old and name.startswith(old) else name


def _span_prefix(cfg: ModelConfig) -> tuple[str, str]:
    return _SPAN_PREFIX.get(cfg.family, ("", ""))


def to_folder(cfg: ModelConfig, dtype: str) -> dict[str, Any]:
    """Our settings as a `config.json`. Raises `ConfigError` for what the family cannot say."""
    base = cfg.model_copy(update={"causal": True, "task_head": None})
    theirs = config_to_folder(base, dtype)
    head = cfg.task_head
    if head is not None:
        plain = FAMILIES[cfg.family].architecture
        stem = _STEMS.get(cfg.family, plain.removesuffix("ForCausalLM").removesuffix("LMHeadModel"))
        theirs["architectures"] = [stem + _ENDS[head.kind]]
        theirs["id2label"] = {str(number): name for number, name in enumerate(head.labels)}
        theirs["label2id"] = {name: number for number, name in enumerate(head.labels)}
        if head.kind == "sequence":
            theirs["problem_type"] = _PROBLEMS[head.problem]
    own: dict[str, Any] = {}
    if not cfg.causal:
        own["causal"] = False
    if head is not None and head.pooling != "last":
        own["pooling"] = head.pooling
    if head is not None and head.kind in _LACKS.get(cfg.family, ()):
        own["head"] = head.kind
    if own:
        theirs["ratoon"] = {"family": theirs["model_type"], **own}
        theirs["model_type"] = OWN_TYPE
    return theirs


def from_folder(theirs: dict[str, Any], where: str) -> ModelConfig:
    """A `config.json` as our settings, with its head. Raises `ArtifactError` for what is not known."""
    theirs = dict(theirs)
    own = theirs.pop("ratoon", None) or {}
    if theirs.get("model_type") == OWN_TYPE:
        if not isinstance(own, dict) or "family" not in own:
            raise ArtifactError("the folder does not say its family", where=where, expected='"ratoon": {"family": …}')
        theirs["model_type"] = own["family"]
    cfg = config_from_folder(theirs, where)
    update: dict[str, Any] = {"causal": bool(own.get("causal", True))}
    architecture = (theirs.get("architectures") or [""])[0]
    kind = next((kind for kind, end in _ENDS.items() if architecture.endswith(end)), None)
    if kind is not None:
        update["task_head"] = _head(kind, theirs, own, where)
    return cfg.model_copy(update=update)


def _head(kind: Any, theirs: dict[str, Any], own: dict[str, Any], where: str) -> HeadConfig:
    names = theirs.get("id2label")
    if kind == "span":
        labels: tuple[str, ...] = ("begin", "end")
    elif isinstance(names, dict) and names:
        labels = tuple(str(names[key]) for key in sorted(names, key=int))
    else:
        count = theirs.get("num_labels") or theirs.get("_num_labels") or 2
        labels = tuple(f"LABEL_{number}" for number in range(int(count)))
    problem = "one"
    if kind == "sequence":
        told = theirs.get("problem_type")
        by_name = {name: ours for ours, name in _PROBLEMS.items()}
        if told is not None and told not in by_name:
            raise ArtifactError(f"'problem_type' is {told!r}", where=where, expected=", ".join(by_name))
        problem = by_name[told] if told is not None else "number" if len(labels) == 1 else "one"
    return HeadConfig(kind=kind, labels=labels, problem=problem, pooling=own.get("pooling", "last"))  # type: ignore[arg-type]
