"""The Dockerfile against the files that it copies, pins and starts, without Docker or network.

`tests/docker/clean_root.py` carries out its `cpu` target.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.docker.dockerfile import (
    ROOT,
    DockerfileError,
    Instruction,
    Stage,
    context,
    copied,
    ignored,
    read,
)

STAGES = read()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PATTERNS = (ROOT / ".dockerignore").read_text().splitlines()
both = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = (line.split("==") for line in lines if not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in found}


def lay(instructions: Iterable[Instruction], folder: Path) -> Path:
    """What COPY puts into WORKDIR."""
    files = context()
    for instruction in instructions:
        for file, where in copied(instruction, files).items():
            (folder / where).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / where)
    return folder


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_the_gpu_image_is_the_default() -> None:
    assert list(STAGES) == ["cpu", "gpu"]


@both
def test_bases_are_pinned(stage: Stage) -> None:
    assert re.search(r":\S*\d\d\.\d\d-|:\S*-20\d{6}-", stage.base)


@both
def test_it_ends_as_a_user_that_is_not_root(stage: Stage) -> None:
    """By number: Kubernetes' runAsNonRoot cannot look a name up."""
    [user] = stage.of("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.text)
    assert all(i.line < user.line for name in ("RUN", "COPY") for i in stage.of(name))
    created = re.search(r"useradd .*--uid (\d+)", " ".join(i.text for i in stage.of("RUN")))
    assert created
    assert created[1] == user.text.split(":")[0]


@both
def test_what_is_copied_is_there_and_is_all_that_runs(stage: Stage, tmp_path: Path) -> None:
    lay(stage.of("COPY"), tmp_path)
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    ours = subprocess.check_output(listing, cwd=ROOT, text=True).split("\n")[:-1]
    ours = [file for file in ours if (ROOT / file).exists()]
    wanted = {file for file in ours if file.split("/")[0] in ("megatron_rw", "examples", "tools")}
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert wanted < there
    assert there <= set(ours)


@pytest.mark.parametrize(
    "path",
    [
        *(".git/config", ".venv/bin/python", ".env", "id_ed25519", "quickstart/report.txt"),
        *("runs/a/checkpoints/iter_0000100/x.distcp", "benchmarks/results/x.log", "tests/ports.py"),
        *("megatron_rw/__pycache__/x.pyc", "tools/.ruff_cache/x", "megatron_rw.egg-info/PKG-INFO"),
        "megatron_rw/kernels/_cuda_0123456789abcdef.so",
    ],
)
def test_dockerignore_keeps_out(path: str) -> None:
    assert ignored(path, PATTERNS)


@pytest.mark.parametrize(
    ("path", "patterns", "expected"),
    [
        ("a/b", ["a"], True),
        ("a/b", ["*", "!a"], False),
        ("a/b", ["!a", "*"], True),
        ("a/b", ["b"], False),
        ("a/b", ["**/b"], True),
        ("b", ["**/b"], True),
        ("a/c/b", ["a/*"], True),
        ("a/c/b", ["a/*b"], False),
        ("ab", ["a"], False),
        ("a", ["# a", ""], False),
    ],
)
def test_dockerignore_is_read_as_docker_does(
    path: str, patterns: list[str], expected: bool
) -> None:
    assert ignored(path, patterns) == expected


@pytest.mark.parametrize(
    "text", ["FROM a AS b\nONBUILD RUN x", "FROM a", "FROM a AS b\nRUN <<EOF\nx\nEOF"]
)
def test_what_the_reader_does_not_know_it_refuses(text: str, tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text(text)
    with pytest.raises(DockerfileError, match="line"):
        read(tmp_path / "Dockerfile")


@both
def test_versions_agree_with_the_project(stage: Stage) -> None:
    variables, pinned = stage.variables(), pins()
    assert variables["VERSION"] == PROJECT["version"]
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["quickstart"]]
    requirements = {r.name: r.specifier for r in map(Requirement, wanted)}
    assert set(variables["DEPENDENCIES"].split()) == requirements.keys() - {"torch"}
    for name, specifier in requirements.items():
        assert specifier.contains(pinned[name]), name


def test_cpu_image_has_the_triton_that_megatron_imports() -> None:
    """A torch for CPUs does not bring it."""
    [step] = [i for i in STAGES["cpu"].of("RUN") if "$DEPENDENCIES" in i.text]
    assert "triton" in step.text.split()
    assert "triton" in pins()


def test_pythons_and_torch_are_those_of_the_project() -> None:
    [debian] = re.findall(r'"python3=([\d.]+)\.\*"', STAGES["cpu"].of("RUN")[0].text)
    [nvidia] = re.findall(r"^# .*Python (\d+\.\d+)\.\d+", (ROOT / "Dockerfile").read_text(), re.M)
    for python in (debian, nvidia):
        assert SpecifierSet(PROJECT["requires-python"]).contains(python)
        assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    [torch] = re.findall(r"torch (\d+\.\d+\.\d+)a0\+", (ROOT / "Dockerfile").read_text())
    assert torch == pins()["torch"]


@both
def test_labels_say_what_the_project_says(stage: Stage) -> None:
    [label] = stage.of("LABEL")
    words = label.words(stage.variables({"REVISION": "abc", "SOURCE": "https://example.org"}))
    labels = dict(word.split("=", 1) for word in words)
    prefix = "org.opencontainers.image."
    assert labels[f"{prefix}title"].split()[0] == PROJECT["name"]
    assert labels[f"{prefix}description"] == PROJECT["description"]
    assert labels[f"{prefix}licenses"] == PROJECT["license"]
    assert labels[f"{prefix}version"] == PROJECT["version"]
    assert labels[f"{prefix}revision"] == "abc"
    assert labels[f"{prefix}source"] == "https://example.org"


@both
def test_health_check_of_the_image(stage: Stage, tmp_path: Path) -> None:
    """With the image's files alone, healthy and then unhealthy."""
    folder = lay(stage.of("COPY"), tmp_path / "image")
    [health] = stage.of("HEALTHCHECK")
    program, *words = health.command()
    assert program == "python"
    heartbeat = "MEGATRON_RW_HEARTBEAT"
    assert stage.variables({})[heartbeat].startswith("/tmp/")
    (tmp_path / "heartbeat").touch()
    for limit, status, said in (("600", 0, "healthy: the run"), ("0", 1, "unhealthy (limit 0 s")):
        result = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env=os.environ
            | {heartbeat: str(tmp_path / "heartbeat"), "MEGATRON_RW_HEALTH_SECONDS": limit},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (result.returncode, result.stderr) == (status, "")
        assert result.stdout.startswith(said)


@both
def test_command_starts_with_the_files_of_the_image(stage: Stage, tmp_path: Path) -> None:
    folder = lay(stage.of("COPY"), tmp_path)
    [command] = stage.of("CMD")
    program, *words = command.command()
    assert program == "python"
    result = subprocess.run(
        [sys.executable, *words, *([] if "--help" in words else ["--help"])],
        cwd=folder,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "usage: " in result.stdout


@pytest.mark.parametrize("replaces", ["", "torch", "jinja2"])
def test_the_packages_of_nvidias_image_stay(replaces: str, tmp_path: Path) -> None:
    """The gpu target's pip step, with a stand-in for pip that replaces a package or does not."""
    [step] = [i for i in STAGES["gpu"].of("RUN") if "DEPENDENCIES" in i.text]
    folder = lay(STAGES["gpu"].of("COPY")[:1], tmp_path / "image")
    torch = "torch==2.11.0a0+a6c236b9fd.nv26.03.46836102"
    (tmp_path / "list").write_text(f"jinja2==3.1.0\n{torch}\ntyping-extensions==4.14.0\n")
    executable(
        tmp_path / "bin" / "pip",
        f'if [ "$1" = list ]; then cat {tmp_path}/list; exit; fi\n'
        f'echo "constraint: $PIP_CONSTRAINT; $@" > {tmp_path}/call\n'
        f"sed -i 's/^{replaces or 'nothing'}==.*/{replaces}==9.9/' {tmp_path}/list",
    )
    result = subprocess.run(
        ["sh", "-c", step.text.replace("/tmp/", f"{tmp_path}/")],
        cwd=folder,
        env=STAGES["gpu"].variables()
        | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PIP_CONSTRAINT": "/etc/pip/constraint"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode == 0) == (not replaces), result.stderr
    merged = (tmp_path / "both.txt").read_text().splitlines()
    assert {torch, "jinja2==3.1.0", "typing-extensions==4.14.0"} < set(merged)
    assert not {"torch==2.11.0", "Jinja2==3.1.6", "typing_extensions==4.16.0"} & set(merged)
    assert {"megatron-core==0.19.2", f"sentencepiece=={pins()['sentencepiece']}"} < set(merged)
    call = (tmp_path / "call").read_text()
    assert call.startswith("constraint: ; install ")
    assert f"-c {tmp_path}/both.txt" in call


def test_kernels_build_from_what_is_copied_before_them(tmp_path: Path) -> None:
    """With a stand-in for nvcc; the code that is copied later must not be needed."""
    stage = STAGES["gpu"]
    [step] = [i for i in stage.of("RUN") if "--no-build-isolation" in i.text]
    folder = lay([i for i in stage.of("COPY") if i.line < step.line], tmp_path / "image")
    executable(
        tmp_path / "cuda" / "bin" / "nvcc",
        f'echo "$@" > {tmp_path}/call\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"',
    )
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | stage.variables() | {"CUDA_HOME": str(tmp_path / "cuda")},
        check=True,
    )
    [library] = (folder / "megatron_rw" / "kernels").glob("_cuda_*.so")
    assert "sm_90a" in (tmp_path / "call").read_text()
    assert ignored(str(library.relative_to(folder)), PATTERNS)
