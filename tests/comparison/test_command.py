"""The command: mistakes in one line each, and the files that it writes."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from megatron_rw.comparison.command import main
from tests.comparison.study import DEFAULT, edit_arguments, edit_lines, flat, write_run, write_study
from tests.data.datasets import Ended, call

GIVEN = "none=runs/none* b=runs/b*"
MISTAKES = {
    "": "give the folders of runs, NAME=GLOB for each arm",
    "none=runs/none": "there is no arm beside the baseline none; give its runs as well",
    "gone": "gone: no folder matches; give folders of runs, or NAME=GLOB",
    "none=gone/*": "none=gone/*: no folder matches; give folders of runs, or NAME=GLOB",
    "=runs/none": "=runs/none: the arm has no name; give NAME=GLOB",
    "none=runs": "runs: has no metrics.jsonl; give the --log-dir of a run",
    f"{GIVEN} --baseline c": "--baseline c: no such arm; there are b, none",
    f"{GIVEN} --noise-domains *": "--noise-domains *: it leaves no domain to compare",
    f"{GIVEN} --margin 0": "--margin 0.0: give a finite number above 0, in nats",
    f"{GIVEN} --margin nan": "--margin nan: give a finite number above 0, in nats",
    f"{GIVEN} --output gone/x": "--output gone/x: there is no directory gone; make it",
    f"{GIVEN} b=runs/same": "runs/same: arm b has the trunk (none) with seed 1 already, in runs/b; "
    "give one of the two",
    "none=runs/none c=runs/seed2": "c: no run has a partner in none of its trunk and seed; run it",
}


def _append(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "metrics.jsonl").open("a").write(text)


def _replace(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut in the middle": (
        lambda folder: edit_lines(folder, '"type": "validation"', '"ty'),
        "runs/b/metrics.jsonl:3: not JSON; restore the file, or leave the run out",
    ),
    "cut in the middle and at the end": (
        _replace("metrics.jsonl", b'{"type": "validation", "iter\n{"type": "valid'),
        "runs/b/metrics.jsonl:1: not JSON; restore the file, or leave the run out",
    ),
    "binary": (
        _replace("metrics.jsonl", b"\xff\xfe\0\n" * 3),
        "runs/b/metrics.jsonl:1: not JSON; restore the file, or leave the run out",
    ),
    "empty": (
        _replace("metrics.jsonl", b""),
        "runs/b/metrics.jsonl: has no validation; train with --eval-interval and --eval-iters",
    ),
    "list": (
        _append("[1]\n"),
        "runs/b/metrics.jsonl:8: not a record of training: it has no type and iteration",
    ),
    "foreign": (
        _append('{"type": "train"}\n'),
        "runs/b/metrics.jsonl:8: not a record of training: it has no type and iteration",
    ),
    "nan": (
        lambda folder: edit_lines(folder, '"lm_loss": 4.4', '"lm_loss": NaN'),
        "runs/b/metrics.jsonl:7: the loss prose is no finite number; a run that has diverged is a "
        "result of its own: report it, and leave its folder out",
    ),
    "null": (
        _append('{"type": "validation", "iteration": 400, "lm_loss": null}\n'),
        "runs/b/metrics.jsonl:8: the loss lm_loss is no finite number; a run that has diverged is "
        "a result of its own: report it, and leave its folder out",
    ),
    "domains": (
        _append('{"type": "validation", "iteration": 400, "lm_loss": 1.0, "domains": [1]}\n'),
        "runs/b/metrics.jsonl:8: 'domains' is not as training writes it",
    ),
    "reweight": (
        lambda folder: edit_lines(folder, '"ess": 0.9', '"ess": "a"'),
        "runs/b/metrics.jsonl: 'reweight' is not as training writes it",
    ),
    "arguments": (
        _replace("arguments.json", b"{"),
        "runs/b/arguments.json: not JSON; restore the file, or leave the run out",
    ),
    "no arguments": (
        lambda folder: (folder / "arguments.json").unlink(),
        "runs/b/arguments.json: no such file; the run is not of this program: leave it out",
    ),
    "argument list": (
        _replace("arguments.json", b"[]"),
        "runs/b/arguments.json: not an object of arguments; restore it, or leave the run out",
    ),
    "seed": (
        lambda folder: edit_arguments(folder, {"seed": "x"}),
        "runs/b/arguments.json: seed x: not as training writes it",
    ),
    "load": (
        lambda folder: edit_arguments(folder, {"load": 7}),
        "runs/b/arguments.json: load 7: not as training writes it",
    ),
    "batch": (
        lambda folder: edit_arguments(folder, {"global_batch_size": [1]}),
        "runs/b/arguments.json: global_batch_size [1]: not as training writes it",
    ),
}


@pytest.fixture(autouse=True)
def _runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, strategy, seed in (
        ("none", "none", 1),
        ("b", "linupper", 1),
        ("same", "linupper", 1),
        ("seed2", "linupper", 2),
    ):
        write_run(Path("runs", name), flat(DEFAULT, 100, 200, 300), strategy, seed)


def command(flags: str, status: int = 0) -> Ended:
    return call(main, *shlex.split(flags), status=status)


@pytest.mark.parametrize("flags", MISTAKES)
def test_a_mistake_is_told_in_one_line(flags: str) -> None:
    assert command(flags, status=2).err == f"error: {MISTAKES[flags]}\n"


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_named(damage: str) -> None:
    spoil, message = DAMAGE[damage]
    spoil(Path("runs/b"))
    assert command("none=runs/none b=runs/b", status=2).err == f"error: {message}\n"


def test_the_cut_last_line_of_a_killed_run_is_dropped() -> None:
    whole = command(GIVEN).out
    _append('{"type": "validation", "iterat')(Path("runs/b"))
    assert command(GIVEN).out == whole


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for flags, packages in ((GIVEN, "scipy"), (f"{GIVEN} --output x", "scipy matplotlib")):
        text = f"a comparison needs what is not installed; run: pip install {packages}"
        assert command(flags, status=2).err == f"error: {text}\n"


def test_it_starts_without_torch_and_megatron() -> None:
    code = (
        "import sys; from megatron_rw.comparison.command import main; main(sys.argv[1:]);"
        "print(*({'torch', 'megatron'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *GIVEN.split(), "--output", "x"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == ""


class _Page(HTMLParser):
    """The tags, and the addresses of attributes, of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        names = ("src", "href", "xlink:href", "action", "data")
        self.addresses |= {value or "" for name, value in attrs if name in names}


@pytest.fixture
def study() -> str:
    write_study(Path("study"), {"none": 0.0, "good": -0.05, "bad": 0.05})
    arms = "none=study/*/none* '<b>&$x_$=study/*/good*' bad=study/*/bad*"
    return f"{arms} --output report.v1 --title '<script>1</script>'"


def test_the_page_needs_nothing_and_escapes_everything(study: str) -> None:
    out = command(study).out
    assert "<b>&$x_$" in out
    assert "wrote report.v1.html, report.v1.png and report.v1.json" in out
    text = Path("report.v1.html").read_text()
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    page = _Page()
    page.feed(text)
    assert not {"script", "b", "link", "img", "iframe"} & page.tags
    assert all(address.startswith(("#", "data:image/png;")) for address in page.addresses)
    assert "&lt;b&gt;&amp;$x_$" in text
    assert page.tags >= {"svg", "table"}
    assert str(Path.cwd()) not in text
    assert Image.open("report.v1.png").size[0] == 1800
    numbers = json.loads(Path("report.v1.json").read_text())
    assert [arm["verdict"] for arm in numbers["arms"]] == ["better", "worse"]


def test_the_same_runs_give_the_same_bytes(study: str) -> None:
    code = "import sys; from megatron_rw.comparison.command import main; main(sys.argv[1:])"
    written = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", code, *shlex.split(study)], env=environment, check=True
        )
        written.append([path.read_bytes() for path in sorted(Path().glob("report.v1.*"))])
    assert len(written[0]) == 3
    assert written[0] == written[1]


def test_runs_without_domains_have_no_table_of_them() -> None:
    for name in ("none", "b"):
        lines = map(json.loads, Path("runs", name, "metrics.jsonl").read_text().splitlines())
        text = "".join(json.dumps({**line, "domains": {}}) + "\n" for line in lines)
        Path("runs", name, "metrics.jsonl").write_text(text)
    assert "by domain" not in command("none=runs/none b=runs/b --output x").out
    assert "by domain" not in Path("x.html").read_text()


def test_a_browser_shows_the_page(study: str) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("needs chromium, to open the page: apt-get install chromium")
    command(study)
    flags = "--headless --no-sandbox --disable-gpu --dump-dom --virtual-time-budget=2000"
    page = Path("report.v1.html").absolute().as_uri()
    done = subprocess.run(
        [chromium, *flags.split(), f"--user-data-dir={Path('profile').absolute()}", page],
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    shown = _Page()
    shown.feed(done.stdout)
    assert shown.tags >= {"svg", "table"}
    assert "Found from" in done.stdout
