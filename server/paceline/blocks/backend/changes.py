"""No answer from objects that changed while a model used them.

Objects never change once they have their names, and are hashed before their first use. But a file
that somebody alters in place alters the pages that sessions refer to. So a run looks at its objects
before and after: a truncated one, whose pages would kill the process, fails it at once; one that
was written to since it was hashed is found before the answer is given. Neither costs reading.

Links, owner and mode may change, which alters a ctime; so does who sets an mtime back. Then the
bytes are hashed again. Removing or replacing a file does no harm: the mapping stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from .manifest import PoolError
from .mapping import LazyObjects, Look, MappedObject


class Changes:
    """Of one model's objects. May be used by several threads."""

    def __init__(
        self,
        objects: LazyObjects,
        check: Callable[[str], None],
        lose: Callable[[Sequence[str]], None],
    ) -> None:
        """`check`: see `Source.check`; `lose` has what was changed fetched and checked again."""
        self._objects = objects
        self._check = check
        self._lose = lose

    def before(self, names: Iterable[str]) -> Mapping[str, int]:
        """How often each object of a run has changed so far. Raises PoolError if truncated."""
        counts: dict[str, int] = {}
        truncated = []
        opened = self._objects.opened
        for name in names:
            one = opened.get(name)
            if one is not None:
                counts[name] = one.changes
                if one.truncated:
                    truncated.append(name)
        if truncated:
            self._lose(truncated)
            raise _refusal(truncated)
        return counts

    def after(
        self, names: Iterable[str], counts: Mapping[str, int], in_parts: Container[str]
    ) -> None:
        """Raises PoolError if one of the objects that a run has used is not what it was.

        `in_parts`: those of which it used parts that were checked by themselves.
        """
        changed, lost = [], []
        opened = self._objects.opened  # all that a run has used are
        for name in names:
            one = opened[name]
            right = one.right
            if one.changes != counts.get(name, 0) or (right is None and name not in in_parts):
                lost.append(name)  # another run has found it
            elif right is not None and one.look() != right and not self._is_right(one, name, right):
                changed.append(name)
        if changed:
            self._lose(changed)
        if changed or lost:
            raise _refusal(changed + lost)

    def _is_right(self, one: MappedObject, name: str, right: Look) -> bool:
        """Of one that looks otherwise now: whether its bytes are and were what they should be."""
        if one.look()[:2] != right[:2]:
            return False
        try:
            self._check(name)
        except PoolError:
            return False
        return True


def _refusal(names: Sequence[str]) -> PoolError:
    others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return PoolError(
        f"object {names[0]}{others}: its file changed while the model used it; there is no answer"
    )
