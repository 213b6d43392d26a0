"""The Dockerfile against the files that it copies, pins and starts, without Docker or network.

`tests/docker/clean_root.py` carries out its `cpu` target.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.docker.dockerfile import ROOT, Stage, context, dockerignore, read

STAGES = read()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    name.replace("_", "-"): version
    for name, version in re.findall(
        r"^([\w.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M
    )
}
both = pytest.mark.parametrize("stage", STAGES.values(), ids=STAGES.keys())


def image(stage: Stage, folder: Path, before: str = "HEALTHCHECK") -> Path:
    """What COPY puts into WORKDIR before an instruction that has a word in it."""
    for instruction in stage.instructions:
        if before in f"{instruction.name} {instruction.text}":
            return folder
        if instruction.name == "COPY":
            instruction.copy(folder)
    raise AssertionError(f"no instruction has {before} in it")


def executable(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def test_hadolint_finds_nothing_and_the_gpu_image_is_the_default() -> None:
    """Among its rules: every tag is pinned, the commands have the exec form."""
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert list(STAGES) == ["cpu", "gpu"]


@both
def test_it_ends_as_a_user_that_is_not_root(stage: Stage) -> None:
    """By number: Kubernetes' runAsNonRoot cannot look a name up."""
    [user] = stage.of("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user.text)
    after = stage.instructions[stage.instructions.index(user) :]
    assert not {"RUN", "COPY"} & {instruction.name for instruction in after}
    uid = user.text.split(":")[0]
    assert any(
        f"useradd --no-log-init --create-home --uid {uid} " in i.text for i in stage.of("RUN")
    )


@both
def test_its_files_are_all_that_its_commands_need(stage: Stage, tmp_path: Path) -> None:
    folder = image(stage, tmp_path)
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    wanted = {f for f in context() if f.split("/")[0] in ("megatron_rw", "examples", "tools")}
    assert wanted < there
    [health], [command] = stage.of("HEALTHCHECK"), stage.of("CMD")
    ask = [] if "--help" in command.text else ["--help"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for words, said in ((health.command(), "healthy"), ([*command.command(), *ask], "usage: ")):
        assert words[0] == "python"
        start = [sys.executable, *words[1:]]
        done = subprocess.run(start, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert said in done.stdout


def test_dockerignore_keeps_out_what_does_not_run() -> None:
    ignored = dockerignore()
    for path in (
        *(".git/config", ".venv/bin/python", ".env", "id_ed25519", "quickstart/report.txt"),
        *("runs/a/x.distcp", "benchmarks/results/x.log", "tests/ports.py", "tools/.ruff_cache/x"),
        *("megatron_rw/__pycache__/x.pyc", "megatron_rw/kernels/_cuda_0123456789abcdef.so"),
    ):
        assert ignored.match_file(path), path


@both
def test_versions_are_those_of_the_project(stage: Stage) -> None:
    variables = stage.variables({"PATH": ""})
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["quickstart"], *extras["prometheus"]]
    requirements = {r.name: r.specifier for r in map(Requirement, wanted)}
    assert set(variables["DEPENDENCIES"].split()) == requirements.keys() - {"torch"}
    assert all(specifier.contains(PINS[name]) for name, specifier in requirements.items())
    assert variables["VERSION"] == PROJECT["version"]
    assert PROJECT["description"] in stage.of("LABEL")[0].text
    text = (ROOT / "Dockerfile").read_text()
    for python in re.findall(r'"python3=([\d.]+)\.\*"|Python (\d+\.\d+)\.\d+', text):
        assert f"Programming Language :: Python :: {''.join(python)}" in PROJECT["classifiers"]
    assert re.findall(r"torch (\d+\.\d+\.\d+)a0\+", text) == [PINS["torch"]]
    # A torch for CPUs does not bring it, and Megatron imports it.
    assert "torch triton $DEPENDENCIES" in STAGES["cpu"].of("RUN")[4].text


@pytest.mark.parametrize("replaces", ["", "torch", "jinja2"])
def test_the_packages_of_nvidias_image_stay(replaces: str, tmp_path: Path) -> None:
    """The gpu target's pip step, with a stand-in for pip that replaces a package or does not."""
    stage = STAGES["gpu"]
    [step] = [i for i in stage.of("RUN") if "$DEPENDENCIES" in i.text]
    folder = image(stage, tmp_path / "image", before="$DEPENDENCIES")
    torch = "torch==2.11.0a0+a6c236b9fd.nv26.03.46836102"
    (tmp_path / "list").write_text(f"jinja2==3.1.0\n{torch}\ntyping-extensions==4.14.0\n")
    executable(
        tmp_path / "bin" / "pip",
        f'if [ "$1" = list ]; then cat {tmp_path}/list; exit; fi\n'
        f'echo "constraint: $PIP_CONSTRAINT; $@" > {tmp_path}/call\n'
        f"sed -i 's/^{replaces or 'nothing'}==.*/{replaces}==9.9/' {tmp_path}/list",
    )
    variables = stage.variables({"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"})
    done = subprocess.run(
        ["sh", "-c", step.text.replace("/tmp/", f"{tmp_path}/")],
        cwd=folder,
        env=variables | {"PIP_CONSTRAINT": "/etc/pip/constraint"},
    )
    assert (done.returncode == 0) == (not replaces)
    merged = (tmp_path / "both.txt").read_text().splitlines()
    assert {torch, "jinja2==3.1.0", f"megatron-core=={PINS['megatron-core']}"} < set(merged)
    assert not {"torch==2.11.0", f"Jinja2=={PINS['Jinja2']}"} & set(merged)
    call = (tmp_path / "call").read_text()
    assert call.startswith("constraint: ; install ")
    assert f"-c {tmp_path}/both.txt" in call


def test_kernels_build_from_what_is_copied_before_them(tmp_path: Path) -> None:
    """With a stand-in for nvcc; the code that is copied later must not be needed."""
    folder = image(STAGES["gpu"], tmp_path / "image", before="--no-build-isolation")
    executable(
        tmp_path / "cuda" / "bin" / "nvcc",
        f'echo "$@" > {tmp_path}/call\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"',
    )
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    environment = STAGES["gpu"].variables(os.environ) | {"CUDA_HOME": str(tmp_path / "cuda")}
    subprocess.run(build, cwd=folder, env=environment, check=True)
    assert len(list((folder / "megatron_rw" / "kernels").glob("_cuda_*.so"))) == 1
    assert "sm_90a" in (tmp_path / "call").read_text()
