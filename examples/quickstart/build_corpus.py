"""Builds a small corpus of unlike domains from the running Python's own standard library.

No network, and the same interpreter gives the same bytes. Into `--output-dir` go
`train/<domain>.jsonl` and `valid/<domain>.jsonl`, a JSON object a line::

    {"text": "...", "domain": "code", "source": "cpython-3.12.1:json/decoder.py"}

Domains:

- `code`: the library's modules without docstrings and comments, so that it shares no text with
- `prose`: the English of those docstrings and comments, a document per module;
- `tests`: the library's tests; where they are not installed (Debian has them in a package of their
  own), `tables` instead: codec tables and the names of Unicode characters;
- `noise`: synthetic, of three kinds that `source` names: random base64, words drawn at
  random from prose documents, repeated boilerplate.

No source file is in both splits of a domain, and the noise of a split uses that split's prose.
"""

import argparse
import ast
import base64
import functools
import inspect
import io
import json
import os
import random
import re
import sys
import sysconfig
import tokenize
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_STDLIB = Path(sysconfig.get_paths()["stdlib"])
DOMAINS = ("code", "prose", "tests", "tables", "noise")

_NOT_LIBRARY = {"__pycache__", "site-packages", "dist-packages", "_bundled", "test", "tests"}
# Tables, and programs that come with the library; their comments are prose all the same.
_NOT_CODE = _NOT_LIBRARY | {"encodings", "idlelib", "lib2to3", "pydoc_data", "turtledemo"}
# Debian keeps some thirty files of test support where the other thousand are missing.
_FEWEST_TEST_FILES = 100
_SHORTEST_DOCUMENT = 200  # bytes
# No document is more than 1/25 of its domain, so that no file alone makes a validation set.
_DOCUMENTS_AT_LEAST = 25
_VALID_AIM, _VALID_MOST = 0.06, 0.08
_NOISE_BYTES = 2000

_WORD = re.compile(r"[(\"'`*]*[A-Za-z][A-Za-z'-]*[)\"'`*,.;:!?]*")
_SENTENCE_END = re.compile(r"[.!?][)\"']*$")
_FUNCTION_WORDS = {
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "can", "for", "from", "if", "in", "is",
    "it", "not", "of", "on", "or", "that", "the", "this", "to", "which", "will", "with", "you",
}  # fmt: skip

_BOILERPLATE = (
    "We use cookies to improve your experience. By continuing you agree to our cookie policy.",
    "Click here to subscribe to our newsletter and never miss an update.",
    "Share this article: Facebook | Twitter | LinkedIn | Email | Print",
    "Loading, please wait ...",
    "Error 404: the page you requested could not be found.",
    "Rated 5 out of 5 stars. 0 people found this review helpful.",
)


@dataclass(frozen=True)
class Document:
    """A line of the corpus."""

    text: str
    domain: str
    source: str

    @property
    def size(self) -> int:
        """Its UTF-8 bytes."""
        return len(self.text.encode())


@dataclass(frozen=True)
class Source:
    """Where a document may come from; it is read only when needed."""

    name: str
    read: Callable[[], str]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    parser = argparse.ArgumentParser(description="Build a small corpus from Python's own library.")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR")
    parser.add_argument(
        "--max-bytes-per-domain",
        type=int,
        default=2_000_000,
        metavar="N",
        help="UTF-8 bytes of text, both splits together (%(default)s); prose may have less",
    )
    parser.add_argument("--seed", type=int, default=1234, help="chooses files, splits and noise")
    args = parser.parse_args(argv)
    if args.max_bytes_per_domain < 20_000:
        parser.error("--max-bytes-per-domain must be at least 20000: less cannot be split")

    train, valid = build(args.max_bytes_per_domain, args.seed)
    try:
        for split, documents in (("train", train), ("valid", valid)):
            _write(args.output_dir / split, documents)
    except OSError as error:
        print(f"error: --output-dir {args.output_dir}: {error}", file=sys.stderr)
        return 2
    print(_table(train, valid))
    return 0


def build(max_bytes: int, seed: int) -> tuple[list[Document], list[Document]]:
    """Builds the corpus in memory.

    Args:
        max_bytes: UTF-8 bytes of text per domain, both splits together.
        seed: Chooses the files, their split and the noise.

    Returns:
        The training and the validation documents, domain after domain.
    """
    tests = _library_files("test", {"__pycache__"})
    sources = {
        "code": _converted(_library_files("", _NOT_CODE), strip_code),
        "prose": _converted(
            _library_files("", _NOT_LIBRARY), functools.partial(extract_prose, seen=set())
        ),
    }
    if len(tests) >= _FEWEST_TEST_FILES:
        sources["tests"] = _converted(tests, str)
    else:
        codecs = _library_files("encodings", {"__pycache__"})
        sources["tables"] = _converted(codecs, str) + _unicode_names()

    train: list[Document] = []
    valid: list[Document] = []
    for domain, candidates in sources.items():
        random.Random(seed).shuffle(candidates)
        documents = _take(candidates, domain, max_bytes)
        held_out = _held_out(documents)
        train += [document for document in documents if document not in held_out]
        valid += held_out
    valid_bytes = int(max_bytes * _VALID_AIM)
    train += _noise(train, max_bytes - valid_bytes, random.Random(f"{seed} train"))
    valid += _noise(valid, valid_bytes, random.Random(f"{seed} valid"))
    return train, valid


def strip_code(source: str) -> str:
    """Returns a module's code without comments and docstrings, otherwise as it was laid out.

    A body that was nothing but a docstring becomes `pass`.

    Raises:
        SyntaxError: If the source is not Python.
    """
    code_and_comments = _without_docstrings(source)
    lines = list(io.StringIO(code_and_comments))  # as tokenize counts lines: form feeds end none
    for token in tokenize.generate_tokens(io.StringIO(code_and_comments).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            code = lines[row - 1][:column].rstrip()
            lines[row - 1] = f"{code}\n" if code else ""
    return "".join(lines).strip("\n") + "\n"


def _without_docstrings(source: str) -> str:
    # ast counts columns in UTF-8 bytes, and lines at \n alone.
    lines = source.encode().split(b"\n")
    for docstring, _, is_whole_body in _docstrings(_parse(source)):
        first, last = docstring.lineno - 1, (docstring.end_lineno or 0) - 1
        before = lines[first][: docstring.col_offset]
        after = lines[last][docstring.end_col_offset :]
        kept = before + (b"pass" if is_whole_body else b"") + after
        # Marked for deletion only, so that the positions of later docstrings stay right.
        lines[first : last + 1] = [kept if kept.strip() else b"\0"] + [b"\0"] * (last - first)
    return b"\n".join(line for line in lines if line != b"\0").decode()


def _docstrings(node: ast.AST) -> Iterator[tuple[ast.Expr, str, bool]]:
    """Yields each docstring's statement, its text, and whether it is the whole body."""
    if (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(statement := node.body[0], ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    ):
        yield statement, statement.value.value, len(node.body) == 1
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child)


def extract_prose(source: str, seen: set[str]) -> str:
    """Returns the English paragraphs of a module's docstrings and comment blocks.

    Args:
        source: The module.
        seen: Paragraphs of earlier modules, which are left out (licences, mostly); the new ones
            are added.

    Returns:
        A paragraph a line, with a blank line between.

    Raises:
        SyntaxError: If the source is not Python.
    """
    blocks = [inspect.cleandoc(text) for _, text, _ in _docstrings(_parse(source))]
    blocks += _comment_blocks(source)
    paragraphs = []
    for block in blocks:
        for lines in re.split(r"\n[ \t]*\n", block):
            paragraph = " ".join(lines.split())
            if paragraph not in seen and is_prose(paragraph):
                seen.add(paragraph)
                paragraphs.append(paragraph)
    return "\n\n".join(paragraphs)


def _comment_blocks(source: str) -> Iterator[str]:
    """Yields runs of whole-line comments, without their marks."""
    block: list[str] = []
    previous = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            row = token.start[0]
            if row != previous + 1:
                yield "\n".join(block)
                block = []
            block.append(token.string.lstrip("#!:"))
            previous = row
    yield "\n".join(block)


def is_prose(paragraph: str) -> bool:
    """Tells whether a paragraph is English sentences: no code, signature, table or doctest."""
    words = paragraph.split()
    if len(words) < 8 or ">>>" in paragraph:
        return False
    if not (paragraph.isprintable() and _SENTENCE_END.search(paragraph)):
        return False
    plain = sum(bool(_WORD.fullmatch(word)) for word in words)
    function_words = sum(word.lower() in _FUNCTION_WORDS for word in words)
    return plain >= 0.85 * len(words) and function_words >= 0.2 * len(words)


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules
        return ast.parse(source)


def _library_files(directory: str, without: set[str]) -> list[Path]:
    found: list[Path] = []
    for parent, directories, names in os.walk(_STDLIB / directory):
        directories[:] = [name for name in directories if name not in without]
        found += [Path(parent, name) for name in names if name.endswith(".py")]
    return sorted(found)


def _converted(paths: Iterable[Path], convert: Callable[[str], str]) -> list[Source]:
    """Returns a source for each file; files that are no valid Python read as nothing."""

    def read(path: Path) -> str:
        try:
            with tokenize.open(path) as file:
                return convert(file.read())
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError):
            return ""  # the library has broken files on purpose, for its tests

    version = ".".join(map(str, sys.version_info[:3]))
    return [
        Source(
            f"cpython-{version}:{path.relative_to(_STDLIB).as_posix()}",
            functools.partial(read, path),
        )
        for path in paths
    ]


def _unicode_names() -> list[Source]:
    """Returns a table of character names for each 256 code points that have any."""

    def table(start: int) -> str:
        characters = map(chr, range(start, start + 256))
        return "".join(
            f"U+{ord(character):04X};{name};{unicodedata.category(character)}\n"
            for character in characters
            # The names of ideographs and Hangul syllables are made by rule, tens of thousands.
            if (name := unicodedata.name(character, ""))
            and not name.endswith(f"-{ord(character):X}")
            and not name.startswith("HANGUL SYLLABLE")
        )

    return [
        Source(
            f"unicodedata-{unicodedata.unidata_version}:U+{start:04X}",
            functools.partial(table, start),
        )
        for start in range(0, 0x20000, 256)
    ]


def _take(sources: Iterable[Source], domain: str, max_bytes: int) -> list[Document]:
    """Reads sources in order until `max_bytes` of text are there, each cut to its largest share."""
    documents: list[Document] = []
    left = max_bytes
    for source in sources:
        text = _cut(source.read(), max_bytes // _DOCUMENTS_AT_LEAST)
        document = Document(text, domain, source.name)
        if document.size > left:
            break
        if document.size >= _SHORTEST_DOCUMENT:
            documents.append(document)
            left -= document.size
    return documents


def _cut(text: str, max_bytes: int) -> str:
    """Returns the leading lines of a text that fit."""
    encoded = text.encode()
    if len(encoded) <= max_bytes:
        return text
    return encoded[: encoded[:max_bytes].rfind(b"\n") + 1].decode()


def _held_out(documents: Sequence[Document]) -> list[Document]:
    """Chooses 5 to 8 % of the bytes, in whole documents."""
    total = sum(document.size for document in documents)
    chosen: list[Document] = []
    size = 0
    for document in documents:
        if size < _VALID_AIM * total and size + document.size <= _VALID_MOST * total:
            chosen.append(document)
            size += document.size
    return chosen


def _noise(documents: Iterable[Document], max_bytes: int, rng: random.Random) -> Iterator[Document]:
    """Yields synthetic documents, as many bytes of each kind."""
    prose = [document for document in documents if document.domain == "prose"]
    size = min(_NOISE_BYTES, max_bytes // 6)
    for number in range(max_bytes // size // 3):
        text = base64.encodebytes(rng.randbytes(size)).decode()[:size]
        yield Document(text, "noise", f"synthetic:random-base64 #{number}")

        original = rng.choice(prose)
        words = original.text.split()
        text = " ".join(rng.choices(words, k=size))[:size]
        yield Document(text, "noise", f"synthetic:random-words #{number} of {original.source}")

        lines = rng.sample(_BOILERPLATE, 3)
        text = "\n".join(lines * size)[:size]
        yield Document(text, "noise", f"synthetic:boilerplate #{number}")


def _write(directory: Path, documents: Iterable[Document]) -> None:
    """Writes a file per domain, each complete whenever it exists under its name."""
    directory.mkdir(parents=True, exist_ok=True)
    by_domain: dict[str, list[Document]] = {domain: [] for domain in DOMAINS}
    for document in documents:
        by_domain[document.domain].append(document)
    for domain, members in by_domain.items():
        path = directory / f"{domain}.jsonl"
        if not members:
            path.unlink(missing_ok=True)  # another interpreter may have had this domain
            continue
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            for document in members:
                file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
        partial.replace(path)


def _table(train: Sequence[Document], valid: Sequence[Document]) -> str:
    lines = [f"{'domain':<8} {'train docs':>10} {'bytes':>11} {'valid docs':>10} {'bytes':>9}"]
    for domain in DOMAINS:
        sizes = [document.size for document in train if document.domain == domain]
        held_out = [document.size for document in valid if document.domain == domain]
        if sizes:
            lines.append(
                f"{domain:<8} {len(sizes):>10,} {sum(sizes):>11,} "
                f"{len(held_out):>10,} {sum(held_out):>9,}"
            )
    if not any(document.domain == "tests" for document in train):
        lines.append("This Python has no library tests; 'tables' stands in for them.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
