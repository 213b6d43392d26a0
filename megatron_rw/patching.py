"""Names of other packages that the program replaces, as entries of a table.

Megatron's training program has no hooks, so its functions are replaced by name. Each replacement is
a `Patch`: what is replaced, by what, and why. `apply` installs a table and `undo` takes it back.
The program's table is `training/patches.py`, the CPU's is `platform/cpu.py`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One name that is replaced.

    Attributes:
        owner: The module or class that holds the name.
        name: The name in it.
        new: What stands there afterwards, or an `Around`.
        why: What the original lacks, or which code needs the replacement.
        seen_in: The release whose original the replacement was written for.
    """

    owner: Any
    name: str
    new: Any
    why: str
    seen_in: str = "megatron-core 0.19.2"

    @property
    def target(self) -> str:
        """The dotted name that is replaced."""
        if inspect.ismodule(self.owner):
            return f"{self.owner.__name__}.{self.name}"
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"


@dataclass(frozen=True)
class Around:
    """A replacement that runs our function, which runs the original.

    Attributes:
        run: Called as `run(proceed, call)`. `call` holds the arguments by name, defaults included.
            `proceed()` calls the original with them, `proceed(name=value)` with some changed. What
            it returns is what the caller gets.
    """

    run: Callable[[Callable[..., Any], dict[str, Any]], Any]

    def replacing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The function that stands in for the original."""
        signature = inspect.signature(original)

        @functools.wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()

            def proceed(**changed: Any) -> Any:
                bound.arguments.update(changed)
                return original(*bound.args, **bound.kwargs)

            return self.run(proceed, dict(bound.arguments))

        return replacement


# The patches in place, each with what stood there before, the oldest first.
_applied: list[tuple[Patch, Any]] = []


def apply(patches: Iterable[Patch]) -> None:
    """Replaces the names. A patch that is in place already is left alone.

    Raises:
        AttributeError: If a name is not there; Megatron has changed then.
    """
    for patch in patches:
        if not any(patch == other for other, _ in _applied):
            _applied.append((patch, _replace(patch)))


def undo() -> None:
    """Puts everything back that `apply` has replaced."""
    while _applied:
        _restore(*_applied.pop())


@contextlib.contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    """Replaces the names while the body runs."""
    replaced = [(patch, _replace(patch)) for patch in patches]
    try:
        yield
    finally:
        for patch, original in reversed(replaced):
            _restore(patch, original)


def _replace(patch: Patch) -> Any:
    original = inspect.getattr_static(patch.owner, patch.name)
    new = patch.new
    if isinstance(new, Around):
        is_static = isinstance(original, staticmethod)
        new = new.replacing(original.__func__ if is_static else original)
        new = staticmethod(new) if is_static else new
    setattr(patch.owner, patch.name, new)
    return original


def _restore(patch: Patch, original: Any) -> None:
    setattr(patch.owner, patch.name, original)
