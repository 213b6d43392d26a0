"""The Dockerfile against the files that it copies, pins and starts, without Docker or network.

`tests/docker/clean_root.py` carries out its `cpu` target.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.docker.dockerfile import ROOT, arguments_of, dockerignore, in_shell, read, write_context

STAGES = read()
CPU, GPU = STAGES.values()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    name.replace("_", "-"): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M
    )
}
both = pytest.mark.parametrize("name", STAGES)


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("context")
    write_context(folder)
    return folder


def image(name: str, context: Path, folder: Path, before: str) -> str:
    """Fills a folder with what a stage copies before the RUN with a word in it: returns that."""
    stage = STAGES[name]
    position = next(i for i, (kind, text) in enumerate(stage) if kind == "RUN" and before in text)
    copies = [instruction for instruction in stage[:position] if instruction.name == "COPY"]
    folder.mkdir()
    subprocess.run(["sh", "-c", in_shell(copies, context)], cwd=folder, check=True)
    return stage[position].text


def executable(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_hadolint_finds_nothing_and_the_gpu_image_is_the_default() -> None:
    """Among its rules: every tag is pinned, the commands have the exec form."""
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert list(STAGES) == ["cpu", "gpu"]


@both
def test_it_ends_as_a_user_that_is_not_root(name: str) -> None:
    """By number: Kubernetes' runAsNonRoot cannot look a name up."""
    kinds = [instruction.name for instruction in STAGES[name]]
    user = STAGES[name][kinds.index("USER")].text
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    assert not {"RUN", "COPY", "USER"} & set(kinds[kinds.index("USER") + 1 :])
    made = f"useradd --no-log-init --create-home --uid {user.split(':')[0]} "
    assert any(made in text for kind, text in STAGES[name] if kind == "RUN")


@both
def test_its_files_are_all_that_its_commands_need(name: str, context: Path, tmp_path: Path) -> None:
    copies = [instruction for instruction in STAGES[name] if instruction.name == "COPY"]
    subprocess.run(["sh", "-c", in_shell(copies, context)], cwd=tmp_path, check=True)
    files = [path.relative_to(context) for path in context.rglob("*") if path.is_file()]
    assert {"megatron_rw", "examples", "tools"} < {file.parts[0] for file in files}
    assert all((tmp_path / file).is_file() for file in files)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    [text] = [text for kind, text in STAGES[name] if kind == "CMD"]
    python, *words = json.loads(text)
    assert python == "python"
    start = [sys.executable, *words, *([] if "--help" in words else ["--help"])]
    done = subprocess.run(start, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


def test_dockerignore_keeps_out_what_does_not_run() -> None:
    ignored = dockerignore()
    for path in (
        *(".git/config", ".venv/bin/python", ".env", "id_ed25519", "quickstart/report.txt"),
        *("runs/a/x.distcp", "benchmarks/results/x.log", "tests/ports.py", "tools/.ruff_cache/x"),
        *("megatron_rw/__pycache__/x.pyc", "build/lib/x.py"),
    ):
        assert ignored.match_file(path), path


@both
def test_versions_are_those_of_the_project(name: str) -> None:
    arguments, extras = arguments_of(STAGES[name]), PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["quickstart"], *extras["prometheus"]]
    requirements = {r.name: r.specifier for r in map(Requirement, wanted)}
    assert set(arguments["DEPENDENCIES"].split()) == requirements.keys() - {"torch"}
    assert all(specifier.contains(PINS[name]) for name, specifier in requirements.items())
    assert arguments["VERSION"] == PROJECT["version"]
    assert any(PROJECT["description"] in text for kind, text in STAGES[name] if kind == "LABEL")


def test_versions_of_python_and_torch_are_those_of_the_project() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for python in re.findall(r'"python3=([\d.]+)\.\*"|Python (\d+\.\d+)\.\d+', text):
        assert f"Programming Language :: Python :: {''.join(python)}" in PROJECT["classifiers"]
    assert re.findall(r"torch (\d+\.\d+\.\d+)a0\+", text) == [PINS["torch"]]
    # A torch for CPUs does not bring Triton, and Megatron imports it.
    assert any("torch triton $DEPENDENCIES" in text for _, text in CPU)


@pytest.mark.parametrize("replaces", ["", "torch", "jinja2"])
def test_the_packages_of_nvidias_image_stay(replaces: str, context: Path, tmp_path: Path) -> None:
    """The gpu target's pip step, with a stand-in for pip that replaces a package or does not."""
    step = image("gpu", context, tmp_path / "image", before="$DEPENDENCIES")
    torch = "torch==2.11.0a0+a6c236b9fd.nv26.03.46836102"
    (tmp_path / "list").write_text(f"jinja2==3.1.0\n{torch}\ntyping-extensions==4.14.0\n")
    executable(
        tmp_path / "bin" / "pip",
        f'if [ "$1" = list ]; then cat {tmp_path}/list; exit; fi\n'
        f'echo "constraint: $PIP_CONSTRAINT; $@" > {tmp_path}/call\n'
        f"sed -i 's/^{replaces or 'nothing'}==.*/{replaces}==9.9/' {tmp_path}/list",
    )
    done = subprocess.run(
        ["sh", "-c", step.replace("/tmp/", f"{tmp_path}/")],
        cwd=tmp_path / "image",
        env=arguments_of(GPU)
        | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PIP_CONSTRAINT": "/etc/pip/constraint"},
    )
    assert (done.returncode == 0) == (not replaces)
    merged = (tmp_path / "both.txt").read_text().splitlines()
    assert {torch, "jinja2==3.1.0", f"megatron-core=={PINS['megatron-core']}"} < set(merged)
    assert not {"torch==2.11.0", f"Jinja2=={PINS['Jinja2']}"} & set(merged)
    call = (tmp_path / "call").read_text()
    assert call.startswith("constraint: ; install ")
    assert f"-c {tmp_path}/both.txt" in call
