"""Items that a run leaves out: each is written down once with its reason, and too many of them stop the run."""

from __future__ import annotations

import json
from pathlib import Path

from mmllm.errors import UserError

SHOWN = 3  # items named in the error itself


class Rejected:
    """Collects what cannot be used, by source.

    Args:
        path: ``rejected.jsonl``, one ``{"source", "id", "where", "why"}`` a line, written anew by each start of a run,
            from the first rejected item on; None keeps the list in memory.
        max_share: the largest share of a source's items that may be left out; ``key`` is its name in the config.
    """

    def __init__(self, path: str | Path | None = None, max_share: float = 0.01, key: str = "data.max_rejected"):
        self.path, self.max_share, self.key = Path(path) if path is not None else None, max_share, key
        self.rows: list[dict[str, str]] = []
        self._totals: dict[str, int] = {}
        self._seen: set[tuple[str, str]] = set()
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def expect(self, source: str, total: int) -> None:
        """Says how many items a source has, good and bad."""
        self._totals[source] = max(total, self._totals.get(source, 0))

    def count(self, source: str | None = None) -> int:
        """Rejected items of one source, of all without one."""
        return sum(source is None or r["source"] == source for r in self.rows)

    def add(self, source: str, item: str, where: object, why: str) -> bool:
        """Writes one item down; False when it is already known."""
        if (source, item) in self._seen:
            return False
        self._seen.add((source, item))
        self.rows.append({"source": source, "id": item, "where": str(where), "why": why})
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps(self.rows[-1], ensure_ascii=False) + "\n")
        return True

    def check(self, source: str) -> None:
        """Stops where more of a source's items than allowed are rejected, naming the first of them.

        Raises:
            UserError: too many.
        """
        rows, total = [r for r in self.rows if r["source"] == source], self._totals.get(source, 0)
        if not rows or len(rows) <= self.max_share * total:
            return
        named = "; ".join(f"{r['where']}: {r['why']}" for r in rows[:SHOWN])
        more = f"; and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        allowed = f"{self.key} allows {self.max_share:.3g}"
        do = f"the list is in {self.path}" if self.path is not None else "run mmllm data check on its file"
        what = f"{len(rows):,} of {total:,} items cannot be used ({allowed}): {named}{more}"
        raise UserError(what, f"source '{source}'", do)
