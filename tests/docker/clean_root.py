"""Run the Dockerfile's `cpu` target without Docker: its instructions in a clean Debian, its CMD.

    python -m tests.docker.clean_root FOLDER [--keep] [NAME=VALUE as by --build-arg ...]

Where there is no container engine this comes nearest. debootstrap makes the Debian that FROM names;
then come the instructions, in a chroot with a process and a mount namespace of its own; then CMD as
the image's user, and beside it the HEALTHCHECK, which must be healthy, and unhealthy while the run
is stopped; last the program's help as some other user. Needs root, debootstrap, 8 GB and a network.

Not the same: Debian of today rather than of the tag's day, no layers, no cgroups, this machine's
network and the certificates that it trusts.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.docker.dockerfile import Stage, read

# What Docker gives to a container whose image says nothing.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
CERTIFICATES_INSIDE = "/run/certificates-of-the-host.crt"
OTHER_USER = "54321:54321"
LIMIT = "MEGATRON_RW_HEALTH_SECONDS"


class CleanRoot:
    """A root folder in which commands run as in a container."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.environment = {"PATH": PATH}
        self.directory = "/"
        self.user = "0:0"

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Starts a command in namespaces of its own; with it, its processes and mounts go."""
        inside = shlex.quote(str(self.path))
        mounts = [f"mount -t proc proc {inside}/proc", f"mount -t tmpfs shm {inside}/dev/shm"]
        for name in ("resolv.conf", "hosts"):
            mounts.append(f"mount --bind /etc/{name} {inside}/etc/{name}")
        script = " && ".join([*mounts, 'exec "$@"'])
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]
        return subprocess.Popen([*isolated, "sh", *self._inside(command, environment)], text=True)

    def run(self, command: Sequence[str]) -> None:
        """Runs a command to its end, which must be a good one, and prints time and size."""
        print(f"--- {shlex.join(command)}", flush=True)
        begun = time.monotonic()
        # A build host's own certificates, where it has some.
        extra = {"PIP_CERT": CERTIFICATES_INSIDE} if CERTIFICATES.exists() else {}
        if self.start(command, **extra).wait() != 0:
            sys.exit("error: it failed")
        size = subprocess.check_output(["du", "-smx", str(self.path)], text=True).split()[0]
        print(f"    {time.monotonic() - begun:.0f} s, root is {size} MB", flush=True)

    def beside(self, process: subprocess.Popen[str], command: Sequence[str], limit: str) -> str:
        """Runs a health check in the namespaces of a run, as `docker exec` does."""
        while not (first := psutil.Process(process.pid).children()):
            time.sleep(0.01)
        enter = ["nsenter", "--mount", "--pid", "--target", str(first[0].pid)]
        inside = self._inside(command, {LIMIT: limit})
        done = subprocess.run([*enter, *inside], capture_output=True, text=True)
        return f"{done.returncode}: {done.stdout.strip()}{done.stderr.strip()}"

    def _inside(self, command: Sequence[str], environment: dict[str, str]) -> list[str]:
        variables = [f"{key}={value}" for key, value in (self.environment | environment).items()]
        chroot = ["chroot", f"--userspec={self.user}", str(self.path), "env", "-i", *variables]
        return [*chroot, "sh", "-c", 'cd "$0" && exec "$@"', self.directory, *command]


def build(root: CleanRoot, stage: Stage, given: dict[str, str]) -> None:
    """Makes the Debian that a stage starts from, and carries out its instructions."""
    match = re.fullmatch(r"debian:([a-z]+)-\d+-slim", stage.base)
    assert match, f"FROM {stage.base}: only debian:SUITE-DATE-slim can be made here"
    debootstrap = ["debootstrap", "--variant=minbase", match[1], str(root.path)]
    subprocess.run(debootstrap, check=True, stdout=subprocess.DEVNULL)
    (root.path / "dev" / "shm").mkdir(exist_ok=True)
    for name in ("resolv.conf", "hosts"):
        (root.path / "etc" / name).touch()
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, root.path / CERTIFICATES_INSIDE.lstrip("/"))
    for instruction in stage.instructions:
        root.environment = stage.variables(root.environment, [instruction])
        if instruction.name == "ARG":
            root.environment |= {k: v for k, v in given.items() if k in root.environment}
        elif instruction.name == "WORKDIR":
            root.directory = instruction.text
            (root.path / root.directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction.name == "USER":
            root.user = instruction.text
        elif instruction.name == "COPY":
            instruction.copy(root.path / root.directory.lstrip("/"))
        elif instruction.name == "RUN":
            root.run(["sh", "-c", instruction.text])


def train(root: CleanRoot, command: Sequence[str], health: Sequence[str]) -> None:
    """Runs CMD to its end, and the health check while it trains and while it is stopped."""
    process = root.start(command)
    try:
        while "the run made progress" not in (seen := root.beside(process, health, "60")):
            if process.poll() is not None or not seen.startswith("0: "):
                sys.exit(f"error: no run was seen: {seen}")
            time.sleep(1)
        family = psutil.Process(process.pid).children(recursive=True)
        ranks = [one for one in family if "pretrain_gpt_rw.py" in " ".join(one.cmdline())]
        users = {rank.uids().real for rank in ranks}
        for rank in ranks:
            rank.suspend()
        time.sleep(12)
        stopped = root.beside(process, health, "10")
        for rank in ranks:
            rank.resume()
        ended = process.wait()
        print(f"    HEALTHCHECK while it trains: {seen}\n    while it is stopped: {stopped}")
        print(f"    the run belongs to user {users} and ended with status {ended}", flush=True)
        if ended or not stopped.startswith("1: ") or users != {int(root.user.split(":")[0])}:
            sys.exit("error: it ought to be 0, 1, the image's user, 0")
    finally:
        process.kill()
        process.wait()


def main() -> None:
    path, *words = sys.argv[1:]
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        sys.exit("error: needs root and debootstrap (apt-get install debootstrap)")
    if Path(path).exists():
        sys.exit(f"error: {path} is there already")
    stage, root = read()["cpu"], CleanRoot(Path(path).resolve())
    with contextlib.ExitStack() as cleanup:
        if "--keep" not in words:
            cleanup.callback(shutil.rmtree, root.path, ignore_errors=True)
        build(root, stage, given)
        train(root, stage.of("CMD")[0].command(), stage.of("HEALTHCHECK")[0].command())
        root.user = OTHER_USER
        help_text = "python pretrain_gpt_rw.py --help > /runs/help.txt && touch ~/own"
        root.run(["sh", "-c", help_text])


if __name__ == "__main__":
    main()
