"""Replaces names of other packages, as entries of a table.

Megatron's training program has no hooks, so its functions are replaced by name. Each replacement is
a `Patch`: what is replaced, by what, and why. `apply` installs a table and `undo` takes it back.
The program's table is `training/patches.py`, the CPU's is `platform/cpu.py`.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One name that is replaced."""

    owner: Any  # The module or class that holds the name.
    name: str
    new: Any  # The replacement, or an `Around`.
    why: str  # What the original lacks, or which code needs the replacement.
    seen_in: str = "megatron-core 0.19.2"  # The release for whose original it was written.

    @property
    def target(self) -> str:
        """The dotted name that is replaced."""
        if inspect.ismodule(self.owner):
            return f"{self.owner.__name__}.{self.name}"
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"


@dataclass(frozen=True)
class Around:
    """A replacement that calls our function, which calls the original.

    Ours is called as `run(proceed, call)`. `call` holds the arguments by name, defaults included.
    `proceed()` calls the original with them, `proceed(name=value)` with some changed. What `run`
    returns goes to the caller.
    """

    run: Callable[[Callable[..., Any], dict[str, Any]], Any]

    def replacing(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Returns the function that replaces the original."""
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


class StandIn:
    """Stands in for a module or object, some of whose names it replaces."""

    def __init__(self, original: Any, **names: Any) -> None:
        self._original = original
        vars(self).update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


# The patches in place, each with its original, the oldest first.
_applied: list[tuple[Patch, Any]] = []


def apply(patches: Iterable[Patch]) -> None:
    """Replaces the names, except for patches that are in place already.

    It raises AttributeError if a name does not exist, which means that Megatron has changed.
    """
    for patch in patches:
        if not any(patch == other for other, _ in _applied):
            _applied.append((patch, _replace(patch)))


def undo() -> None:
    """Restores everything that `apply` has replaced."""
    while _applied:
        patch, original = _applied.pop()
        setattr(patch.owner, patch.name, original)


@contextlib.contextmanager
def applied(patches: Iterable[Patch]) -> Iterator[None]:
    """Replaces the names while the body runs."""
    replaced = [(patch, _replace(patch)) for patch in patches]
    try:
        yield
    finally:
        for patch, original in reversed(replaced):
            setattr(patch.owner, patch.name, original)


def _replace(patch: Patch) -> Any:
    original = inspect.getattr_static(patch.owner, patch.name)
    new = patch.new
    if isinstance(new, Around):
        is_static = isinstance(original, staticmethod)
        new = new.replacing(original.__func__ if is_static else original)
        new = staticmethod(new) if is_static else new
    setattr(patch.owner, patch.name, new)
    return original
