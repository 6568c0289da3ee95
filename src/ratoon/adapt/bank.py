"""Several adapters on one loaded base, chosen for each row of a batch.

Decides which adapter a row is computed with. The parts of each adapter are the methods' own modules, taken out of the
model after they were put in once; a site of the bank holds those of all adapters, and computes a batch with the base's
layer once and each adapter's part on its rows. The choice is kept in a context variable, never in a module: threads
that share a model do not disturb each other.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ratoon.adapt.contract import Method
from ratoon.adapt.slots import with_virtual
from ratoon.base.errors import ConfigError
from ratoon.model.config import ModelConfig
from ratoon.model.transformer import Block, Transformer

VIRTUAL = "virtual"
Names = Sequence[str | None]


@dataclass(frozen=True)
class Group:
    """The rows of a batch that go to one adapter; None: to the base as it is."""

    name: str | None
    rows: tuple[int, ...]
    on: dict[torch.device, Tensor] = field(default_factory=dict, compare=False)

    def index(self, device: torch.device) -> Tensor:
        """The rows' numbers as a tensor on `device`."""
        if device not in self.on:
            self.on[device] = torch.tensor(self.rows, device=device)
        return self.on[device]


@dataclass(frozen=True)
class _Choice:
    """The adapters of a batch's rows, as `AdapterBank.rows` was told them, and each row's virtual tokens."""

    names: tuple[str | None, ...]
    slots: tuple[int, ...]

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        found: dict[str | None, list[int]] = {}
        for row, name in enumerate(self.names):
            found.setdefault(name, []).append(row)
        return tuple(Group(name, tuple(rows)) for name, rows in found.items())


_chosen: ContextVar[Mapping[int, _Choice]] = ContextVar("ratoon_adapters", default={})  # noqa: B039 - never changed
"""By the identity of the model: the adapters of the rows of the calls to come."""


@contextmanager
def these_rows(model: nn.Module, rows: Sequence[int]) -> Iterator[None]:
    """Inside, a call's row i is row `rows[i]` of those that adapters were chosen for: what a loop says that reads its
    rows in another order, some of them, or several times over."""
    chosen = _chosen.get()
    choice = chosen.get(id(model))
    if choice is None:
        yield
        return
    here = _Choice(tuple(choice.names[row] for row in rows), tuple(choice.slots[row] for row in rows))
    token = _chosen.set({**chosen, id(model): here})
    try:
        yield
    finally:
        _chosen.reset(token)


def leading_slots(model: nn.Module, rows: int) -> tuple[int, ...]:
    """The virtual tokens in front of each of so many rows that the adapters chosen for them ask for; 0 where nobody
    chose. Raises `ConfigError` where adapters were chosen for another number of rows."""
    choice = _chosen.get().get(id(model))
    return (0,) * rows if choice is None else _for(choice, rows).slots


def _for(choice: _Choice, rows: int) -> _Choice:
    if len(choice.names) != rows:
        raise ConfigError(
            f"the call has {rows} rows, and adapters were chosen for {len(choice.names)}",
            where="AdapterBank.rows",
            expected="a name (or None) for each row",
        )
    return choice


class _Place(nn.Module):
    """A place of the model that some adapters have a part in."""

    def __init__(self, model: nn.Module, base: nn.Module | None = None) -> None:
        super().__init__()
        self.base = base  # before the parts, which hold it too: by this name it is known
        self._model_id = id(model)
        self._names: dict[str, str] = {}  # an adapter's name may be what a module's may not
        self.parts = nn.ModuleDict()

    def give(self, name: str, part: nn.Module) -> None:
        self._names[name] = str(len(self.parts))
        self.parts[self._names[name]] = part

    def train(self, mode: bool = True) -> _Place:
        """The parts are there to be read: what only training has (dropout) stays off in them."""
        super().train(mode)
        self.parts.eval()
        return self

    @property
    def tokens(self) -> int:
        """The most virtual tokens that an adapter has here."""
        return max(int(part.tokens) for part in self.parts.values())  # type: ignore[arg-type]

    def groups(self, rows: int) -> list[tuple[Group, nn.Module | None]] | None:
        """The groups of a batch of so many rows with their parts here; None where no row has one."""
        choice = _chosen.get().get(self._model_id)
        if choice is None:
            return None
        found = [(group, self._part(group.name)) for group in _for(choice, rows).groups]
        return found if any(part is not None for _, part in found) else None

    def _part(self, name: str | None) -> nn.Module | None:
        return None if name is None or name not in self._names else self.parts[self._names[name]]


class BankSite(_Place):
    """A linear layer `base` and the adapters' modules that stand in its place, each with the same base inside.

    A part with `after(x, h)` says what it makes of its rows' inputs and of what the layer gave for them: then the layer
    is computed once for all rows. Others compute their rows by themselves.
    """

    base: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        found = self.groups(len(x))
        if found is None:
            plain: Tensor = self.base(x)
            return plain
        if len(found) == 1:
            ((_, part),) = found
            assert part is not None
            whole: Tensor = part(x)
            return whole
        own: list[tuple[Tensor, Any]] = [(group.index(x.device), part) for group, part in found if part is not None]
        apart = [(index, part) for index, part in own if hasattr(part, "after")]
        alone = [(index, part) for index, part in own if not hasattr(part, "after")]
        h = self._outputs(x, alone)
        for index, part in apart:
            h[index] = part.after(x[index], h[index])
        return h

    def _outputs(self, x: Tensor, alone: list[tuple[Tensor, Any]]) -> Tensor:
        """Each row's output: of the parts in `alone` for their rows, of the base for the others."""
        if not alone:
            plain: Tensor = self.base(x)
            return plain
        rest = torch.ones(len(x), dtype=torch.bool, device=x.device)
        pieces = []
        for index, part in alone:
            pieces.append((index, part(x[index])))
            rest[index] = False
        h = x.new_empty(*x.shape[:-1], pieces[0][1].shape[-1])
        if bool(rest.any()):
            h[rest] = self.base(x[rest])
        for index, piece in pieces:
            h[index] = piece
        return h


class BankVirtual(_Place):
    """The learned embeddings of the adapters that have some; stands at `Transformer.virtual`."""

    def forward(self, x_BTD: Tensor, position_BT: Tensor) -> Tensor:
        for group, part in self.groups(len(x_BTD)) or ():
            if part is not None:
                index = group.index(x_BTD.device)
                own_BT = position_BT if len(position_BT) == 1 else position_BT[index]
                x_BTD = x_BTD.index_copy(0, index, part(x_BTD[index], own_BT))
        return x_BTD


class BankPrefix(_Place):
    """A layer's learned keys and values of the adapters that have some; stands at `Attention.prefix`."""

    def forward(self, k_BTKC: Tensor, v_BTKC: Tensor, start: int, position_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        for group, part in self.groups(len(k_BTKC)) or ():
            if part is not None:
                index = group.index(k_BTKC.device)
                own_BT = position_BT if position_BT is None or len(position_BT) == 1 else position_BT[index]
                k, v = part(k_BTKC[index], v_BTKC[index], start, own_BT)
                k_BTKC, v_BTKC = k_BTKC.index_copy(0, index, k), v_BTKC.index_copy(0, index, v)
        return k_BTKC, v_BTKC


class AdapterBank:
    """Adapters on one base: `add` them, then `with bank.rows(["a", None, "b"]):` around any call of the model.

    Without `rows` the model is the base. `close` takes everything out. Adapters are added and taken away while nobody
    computes with the model. Raises `ConfigError` where the model carries an adapter already.
    """

    def __init__(self, model: Transformer, *, base_hash: str | None = None) -> None:
        carried = _parts_of(model, _places(model))
        if carried:
            raise ConfigError(
                f"the model carries an adapter already, at {next(iter(carried))} for one",
                where="AdapterBank(model)",
                expected="a base alone",
                fix="save that adapter, take it out (method.remove), and add its folder",
            )
        self.model = model
        self.base_hash = base_hash
        self._adapters: dict[str, tuple[Method, dict[str, nn.Module]]] = {}
        self._base = _places(model)

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters' names."""
        return tuple(self._adapters)

    def add(
        self, name: str, source: str | os.PathLike[str] | Method, weights: Mapping[str, Tensor] | None = None
    ) -> Method:
        """Take in an adapter: a folder, or a method and what its `peft_weights` gave.

        Raises `ConfigError` for a name that is taken, for a method that trains the base itself, and for an adapter with
        a task head of its own; `ArtifactError` for one that was made for another base.
        """
        if name in self._adapters:
            raise ConfigError(f"there is an adapter '{name}' already", where="AdapterBank.add", fix="remove it first")
        base = _Base.of(self.model)
        self._clear()
        try:
            method = self._put_in(source, weights)
            parts = _parts_of(self.model, self._base)
            self._check(name, method, parts, base)
        finally:
            self._clear()
            base.restore(self.model)
            self._fill()
        self._adapters[name] = (method, parts)
        for part in parts.values():
            for parameter in part.parameters():
                if id(parameter) not in base.asked:
                    parameter.requires_grad_(False)
        self._fill()
        return method

    def remove(self, name: str) -> None:
        """Take an adapter away."""
        self._known(name)
        self._clear()
        del self._adapters[name]
        self._fill()

    def close(self) -> None:
        """Take all adapters away: the base is what it was, bit for bit."""
        self._clear()
        self._adapters.clear()

    def virtual_tokens(self, name: str | None) -> int:
        """The slots in front of each text that an adapter has for its own; see `slots.py`."""
        return 0 if name is None else self._known(name).virtual_tokens

    def with_virtual(self, name: str | None, ids: Sequence[int]) -> list[int]:
        """A text's ids, behind the slots of the adapter that it is for."""
        return with_virtual(ids, self.virtual_tokens(name))

    @contextmanager
    def rows(self, names: Names) -> Iterator[None]:
        """Inside, row i of each call of the model is computed with the adapter `names[i]`; None: with the base alone.

        In `generate` the rows are the prompts, and the loop makes room for virtual tokens; in other calls the caller
        does (`with_virtual`), and pads rows of unequal length. Holds for this thread (or task) alone. Raises
        `ConfigError` for an unknown name, and in a call with another number of rows.
        """
        choice = _Choice(tuple(names), tuple(map(self.virtual_tokens, names)))
        token = _chosen.set({**_chosen.get(), id(self.model): choice})
        try:
            yield
        finally:
            _chosen.reset(token)

    def _known(self, name: str) -> Method:
        if name not in self._adapters:
            near = difflib.get_close_matches(name, self.names, n=1)
            raise ConfigError(
                f"there is no adapter '{name}'",
                where="AdapterBank",
                expected="one of: " + (", ".join(self.names) or "none was added yet"),
                fix=f"did you mean '{near[0]}'?" if near else None,
            )
        return self._adapters[name][0]

    def _put_in(self, source: str | os.PathLike[str] | Method, weights: Mapping[str, Tensor] | None) -> Method:
        if not isinstance(source, Method):
            from ratoon.adapt.folder import load_adapter

            assert weights is None, "a folder has its own weights"
            loaded: Method = load_adapter(self.model, source, base_hash=self.base_hash)
            return loaded
        source.install(self.model, seed=0)
        if weights is not None:
            source.load_peft(self.model, weights)
        return source

    def _check(self, name: str, method: Method, parts: Mapping[str, Any], base: _Base) -> None:
        if not parts:
            raise ConfigError(
                f"the adapter '{name}' ({method.kind}) has no parts of its own beside the base",
                where="AdapterBank.add",
                expected="a method of few parameters",
                fix="a model trained with all its parameters is loaded as a model",
            )
        if self.model.cfg.causal != base.cfg.causal:
            raise ConfigError(
                f"the adapter '{name}' was trained with attention in "
                f"{'one direction' if self.model.cfg.causal else 'both directions'}, and the base reads otherwise",
                where="AdapterBank.add",
                expected="adapters that read as the base does",
                fix="load it with its base alone, or let the base read so (set_causal) before the bank is made",
            )
        if self.model.task_head is not base.task_head or not _same(base.scores, _scores(self.model)):
            raise ConfigError(
                f"the adapter '{name}' has a task head of its own, and the rows of a batch share one",
                where="AdapterBank.add",
                expected="adapters without a head, or with the head of the base",
                fix="load it with its base alone",
            )

    def _clear(self) -> None:
        """Set the base's own modules in their places."""
        for place, module in self._base.items():
            _put(self.model, place, module)

    def _fill(self) -> None:
        """Set the bank's modules in the places that some adapter has a part in."""
        places: dict[str, _Place] = {}
        for name, (_, parts) in self._adapters.items():
            for place, part in parts.items():
                if place not in places:
                    places[place] = self._place(place)
                places[place].give(name, part)
        for place, module in places.items():
            _put(self.model, place, module.train(self.model.training))

    def _place(self, place: str) -> _Place:
        base = self._base[place]
        if base is not None:
            return BankSite(self.model, base)
        return BankVirtual(self.model) if place == VIRTUAL else BankPrefix(self.model)


@dataclass(frozen=True)
class _Base:
    """What putting an adapter in may change of a model, beside the places of its parts."""

    cfg: ModelConfig
    head: nn.Module | None
    task_head: nn.Module | None
    scores: list[Tensor]
    training: bool
    asked: dict[int, bool]

    @classmethod
    def of(cls, model: Transformer) -> _Base:
        asked = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
        scores = [value.clone() for value in _scores(model)]
        return cls(model.cfg, model.head, model.task_head, scores, model.training, asked)

    @torch.no_grad()
    def restore(self, model: Transformer) -> None:
        model.set_causal(self.cfg.causal)
        model.cfg, model.head, model.task_head = self.cfg, self.head, self.task_head  # type: ignore[assignment]
        for parameter, value in zip(_scores(model), self.scores, strict=True):
            parameter.copy_(value)
        model.train(self.training)
        for parameter in model.parameters():
            parameter.requires_grad_(self.asked[id(parameter)])


def _scores(model: Transformer) -> list[Tensor]:
    """The parameters of a task head."""
    return [] if model.task_head is None else [parameter.detach() for parameter in model.task_head.parameters()]


def _same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _places(model: Transformer) -> dict[str, nn.Module | None]:
    """What stands in each place that a method may change."""
    found: dict[str, nn.Module | None] = {site.name: model.get_submodule(site.name) for site in model.sites()}
    found[VIRTUAL] = model.virtual
    for number, block in enumerate(model.layers):
        assert isinstance(block, Block)
        found[f"layers.{number}.attention.prefix"] = block.attention.prefix
    return found


def _parts_of(model: Transformer, base: Mapping[str, nn.Module | None]) -> dict[str, nn.Module]:
    """The modules that stand where the base has another, or none; compared with itself: those around a base."""
    found = {}
    for place, module in _places(model).items():
        if module is not None and (module is not base[place] or hasattr(module, "base") or base[place] is None):
            found[place] = module
    return found


def _put(model: Transformer, place: str, module: nn.Module | None) -> None:
    parent, _, leaf = place.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
