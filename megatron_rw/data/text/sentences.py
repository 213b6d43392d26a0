"""Cuts texts into sentences, for training on sentences as sequences."""

from __future__ import annotations

from collections.abc import Callable

from megatron_rw.errors import UserError


def sentence_splitter(language: str | None) -> Callable[[str], list[str]]:
    """Returns a function that cuts a text into sentences without losing anything.

    Args:
        language: Code of the language, such as `en`; None leaves texts whole.

    Raises:
        UserError: If the package that finds sentences is missing.
    """
    if language is None:
        return lambda text: [text]
    try:
        from sentencex import segment
    except ImportError as error:
        raise UserError(
            "--split-sentences needs a package that is not installed; run: pip install sentencex"
        ) from error
    return lambda text: list(segment(language, text))
