"""Cuts texts into sentences, for those who train on sentences as sequences."""

from __future__ import annotations

from collections.abc import Callable

from megatron_rw.errors import UserError


def sentence_splitter(language: str) -> Callable[[str], list[str]]:
    """Returns a function that cuts a text into sentences, of which nothing is lost.

    Args:
        language: code of the language, such as `en`.

    Raises:
        UserError: the package that does it is missing.
    """
    try:
        from sentencex import segment
    except ImportError as error:
        raise UserError(
            "--split-sentences needs a package that is not installed; run: pip install sentencex"
        ) from error
    return lambda text: list(segment(language, text))
