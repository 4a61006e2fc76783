"""What pretrain and tune train on: records of several files as conversations, screened before the first step."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from mmllm.data.open import DataSpec
from mmllm.errors import UserError

if TYPE_CHECKING:
    from mmllm.data.mixtures import Mixture
    from mmllm.data.records import Located
    from mmllm.data.rejected import Rejected


class ChatSource(DataSpec):
    """A source of conversations.

    Attributes:
        recipes: data recipes that make its records, by name or ``{type: NAME, ...}``.
        weight: its share of each epoch, of the sum of all weights; None: every record once.
        first: so many of its records come before all else, of its share of the first epoch; takes a ``weight``.
    """

    recipes: list[str | dict[str, Any]] = Field(default_factory=list)
    weight: float | None = Field(default=None, gt=0)
    first: int = Field(default=0, ge=0)


ChatSources = str | ChatSource | list[str | ChatSource]


@dataclass
class ChatData:
    """Conversations with their places.

    Attributes:
        records, where: each record, and ``file:line (id 'x')``.
        source: number of the source of each; those of one source stand together.
        names, weights, first: of the sources; no weights: every record comes once an epoch.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    first: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.records)

    def screened(self, problem: Callable[[dict[str, Any]], str | None], rejected: Rejected) -> ChatData:
        """The data without the records that have a problem, which are written down.

        Raises:
            UserError: a source has more of them than allowed, or nothing is left.
        """
        problems = [problem(record) for record in self.records]
        for number, why in enumerate(problems):
            if why is not None:
                rejected.add(self.names[self.source[number]], self.where[number], self.where[number], why)
        return self.kept([n for n, why in enumerate(problems) if why is None], rejected)

    def kept(self, good: Sequence[int], rejected: Rejected) -> ChatData:
        """Those records alone; errors as in ``screened``."""
        for name in dict.fromkeys(self.names):
            rejected.check(name)
        if not good:
            raise UserError("no record is left to train on", ", ".join(self.names))
        return self._at(good)

    def _at(self, rows: Sequence[int]) -> ChatData:
        records, where = [self.records[n] for n in rows], [self.where[n] for n in rows]
        return ChatData(records, where, [self.source[n] for n in rows], self.names, self.weights, self.first)

    def mixture(self, seed: int) -> Mixture | None:
        """Which records each epoch has; None: all of them, once."""
        from mmllm.data.mixtures import Mixture

        if self.weights is None:
            return None
        return Mixture([self.source.count(k) for k in range(len(self.names))], self.weights, seed, self.first)

    def only(self, records: Sequence[dict[str, Any]]) -> ChatData:
        """Records of these in another order, some of them several times."""
        at = {id(record): n for n, record in enumerate(self.records)}
        return self._at(sorted((at[id(record)] for record in records), key=self.source.__getitem__))

    def joined(self, other: ChatData, share: float) -> ChatData:
        """Both; where these are weighted, the other ones together get ``share`` of each epoch."""
        weights = self.weights
        if weights is not None:
            sizes = [other.source.count(k) / len(other) for k in range(len(other.names))]
            weights = [w / sum(weights) * (1 - share) for w in weights] + [share * size for size in sizes]
        source = [*self.source, *(len(self.names) + k for k in other.source)]
        names, where = [*self.names, *other.names], [*self.where, *other.where]
        return ChatData([*self.records, *other.records], where, source, names, weights, self.first)


def read_chat(data: ChatSources, folder: Path, rejected: Rejected, limit: int | None = None) -> ChatData:
    """Reads all sources; what is no conversation that can be trained on is written down and left out.

    Args:
        folder: what paths are relative to.
        limit: the first so many records of all sources together.

    Raises:
        UserError: a missing file, an unknown recipe, weights for some sources only, or too many rejected records.
    """
    listed = data if isinstance(data, list) else [data]
    sources = [s if isinstance(s, ChatSource) else ChatSource(path=s) for s in listed]
    if any(s.weight is None for s in sources) and any(s.weight is not None for s in sources):
        where = next(f"data.{k}" for k, s in enumerate(sources) if s.weight is None)
        raise UserError("this source has no weight, others have", where, "give all of them a weight, or none")
    early = next((k for k, s in enumerate(sources) if s.first and s.weight is None), None)
    if early is not None:
        raise UserError("comes first, but has no weight", f"data.{early}.first", "give all sources a weight")
    out, left = ChatData(), limit
    for number, spec in enumerate(sources):
        items = list(itertools.islice(_items(spec, folder), left))
        left = None if left is None else left - len(items)
        out.names.append(spec.path)
        _screen(items, number, out, rejected)
    if not len(out):
        raise UserError("no records", folder / sources[0].path)
    if sources[0].weight is not None:
        out.weights, out.first = [float(s.weight or 0) for s in sources], [s.first for s in sources]
        empty = next((k for k in range(len(sources)) if k not in out.source), None)
        if empty is not None:
            raise UserError("a source with a weight has no records", f"data.{empty}", f"look at {sources[empty].path}")
    return out


def _items(spec: ChatSource, folder: Path) -> Iterator[Located]:
    from mmllm.data.open import located_records
    from mmllm.data.recipes import apply_recipes

    return apply_recipes(located_records(spec, None, folder), spec.recipes, f"data '{spec.path}': recipes")


def _screen(items: Sequence[Located], number: int, out: ChatData, rejected: Rejected) -> None:
    """Adds the good records of one source to ``out``."""
    from mmllm.data.chat_check import conversation_problem
    from mmllm.data.chat_forms import to_conversation
    from mmllm.data.check import box_problems

    name = out.names[number]
    for item in items:
        problem, record = item.problem, item.record
        name_of = item.id if record is None else record.get("id")
        where = item.where if name_of is None else f"{item.where} (id '{name_of}')"
        if record is not None:
            try:
                problem = next(box_problems(record.get("boxes")), None)
                record = record if problem else to_conversation(record)
                problem = problem or conversation_problem(record)
            except UserError as e:
                problem = f"{e.what}; {e.do}" if e.do else e.what
        if record is None or problem is not None:
            rejected.add(name, where, where, str(problem))
        else:
            out.records.append(record)
            out.where.append(where)
            out.source.append(number)
    rejected.expect(name, len(items))
    rejected.check(name)
