"""Shared fixtures: one thread per process, and a small two-domain dataset."""

from __future__ import annotations

import os

# Before anything imports torch: two cores are shared by up to four ranks.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.corpus import EOD, VOCAB_SIZE, flags_of, write_corpus

# How long an example takes is the machine's business: one that is busy fails nothing. Examples
# share their test's fixtures; those that write into `tmp_path` begin by making it theirs.
settings.register_profile(
    "any machine",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("any machine")

__all__ = ["EOD", "VOCAB_SIZE"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two datasets of token ids: `easy` repeats itself, `noise` is random."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder


@pytest.fixture(scope="session")
def data_flags(corpus: Path) -> list[str]:
    """The two-domain blend and its tokenizer."""
    return flags_of(corpus)
