r"""Run the Dockerfile's `cpu` target without Docker: its instructions in a clean Debian, its CMD.

    python -m tests.docker.clean_root /var/tmp/clean-root [--build-arg NAME=VALUE ...]

Where there is no container engine this is what comes nearest. debootstrap makes the Debian that
FROM names; then come RUN, COPY, ENV, WORKDIR and USER, as the Dockerfile has them, in a chroot with
a process and a mount namespace of its own; then CMD as the image's user, and beside it the
HEALTHCHECK, which must be healthy, and unhealthy while the run is stopped; last the program's help
as some other user. Needs root, debootstrap, 8 GB and a network. The folder must be new, and is
removed at the end unless --keep is given.

Not the same: Debian of today rather than of the tag's day, no layers, no cgroups, this machine's
network and the certificates that it trusts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.docker.dockerfile import ROOT, DockerfileError, Stage, context, copied, read

# What Docker gives to a container whose image says nothing.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
CERTIFICATES_INSIDE = "/run/certificates-of-the-host.crt"
ROOT_USER, OTHER_USER = "0:0", "54321:54321"


@dataclass
class CleanRoot:
    """A root folder in which commands run as in a container.

    Attributes:
        path: the folder.
        environment: of the next command.
        directory: where it runs.
        user: as whom, `uid:gid`.
    """

    path: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    directory: str = "/"
    user: str = ROOT_USER

    def start(
        self, command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[str]:
        """Start a command in namespaces of its own; with it, its processes and mounts go."""
        inside = shlex.quote(str(self.path))
        mounts = [f"mount -t proc proc {inside}/proc", f"mount -t tmpfs shm {inside}/dev/shm"]
        mounts += [
            f"mount --bind /etc/{name} {inside}/etc/{name}" for name in ("resolv.conf", "hosts")
        ]
        chroot = f'exec chroot --userspec={self.user} {inside} "$@"'
        script = " && ".join([*mounts, chroot])
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
        return subprocess.Popen(
            [*isolated, "sh", "-c", script, "sh", *self._command(command, environment)], text=True
        )

    def run(self, command: Sequence[str]) -> None:
        """Run a command to its end.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        # Not the image's: a build host's own certificates, where it has some.
        extra = {"PIP_CERT": CERTIFICATES_INSIDE} if CERTIFICATES.exists() else {}
        status = self.start(command, extra).wait()
        if status:
            raise subprocess.CalledProcessError(status, command)

    def beside(
        self, process: subprocess.Popen[str], command: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the namespaces of one that runs, as `docker exec` does."""
        enter = ["nsenter", "--mount", "--pid", "--target", str(first_process(process))]
        chroot = ["chroot", f"--userspec={self.user}", str(self.path)]
        return subprocess.run(
            [*enter, *chroot, *self._command(command, environment)],
            capture_output=True,
            text=True,
            check=False,
        )

    def _command(self, command: Sequence[str], extra: Mapping[str, str]) -> list[str]:
        variables = [f"{key}={value}" for key, value in (self.environment | dict(extra)).items()]
        return [
            "env",
            "-i",
            *variables,
            "sh",
            "-c",
            'cd "$0" && exec "$@"',
            self.directory,
            *command,
        ]


def first_process(process: subprocess.Popen[str]) -> int:
    """The first process in the namespace that `unshare` has made."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not children.read_text().split():
        time.sleep(0.01)
    return int(children.read_text().split()[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Build, run, check, and print times and sizes."""
    parser = argparse.ArgumentParser(description="Try the cpu target in a clean Debian.")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--keep", action="store_true", help="do not remove the folder")
    args = parser.parse_args(argv)
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        parser.error("needs root and debootstrap (apt-get install debootstrap)")
    if args.folder.exists():
        parser.error(f"{args.folder} is there already")
    stage = read()["cpu"]
    root = CleanRoot(args.folder.resolve())
    try:
        with timed(root, f"FROM {stage.base}"):
            debootstrap(root, stage.base)
        build(root, stage, dict(given.split("=", 1) for given in args.build_arg))
        [command], [health] = stage.of("CMD"), stage.of("HEALTHCHECK")
        with timed(root, f"CMD {command.text}"):
            train(root, command.command(), health.command())
        root.user = OTHER_USER
        with timed(root, f"as user {OTHER_USER}"):
            root.run(
                ["sh", "-c", "python pretrain_gpt_rw.py --help > /runs/help.txt && touch ~/own"]
            )
    finally:
        if not args.keep:
            shutil.rmtree(args.folder, ignore_errors=True)
    return 0


@contextlib.contextmanager
def timed(root: CleanRoot, what: str) -> Iterator[None]:
    """Print what is begun, and then how long it took and how large the root is."""
    print(f"--- {what}", flush=True)
    begun = time.monotonic()
    yield
    seconds = time.monotonic() - begun
    size = subprocess.check_output(["du", "-smx", str(root.path)], text=True).split()[0]
    print(f"    {seconds:.0f} s, root is {size} MB", flush=True)


def debootstrap(root: CleanRoot, base: str) -> None:
    """Make the Debian that an official image of it starts from.

    Raises:
        DockerfileError: the base is no Debian.
    """
    match = re.fullmatch(r"debian:([a-z]+)-\d+-slim", base)
    if not match:
        raise DockerfileError(f"FROM {base}: only debian:SUITE-DATE-slim can be made here")
    command = ["debootstrap", "--variant=minbase", match[1], str(root.path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (root.path / "dev" / "shm").mkdir(exist_ok=True)
    for name in ("resolv.conf", "hosts"):
        (root.path / "etc" / name).touch()
    if CERTIFICATES.exists():
        shutil.copy(CERTIFICATES, root.path / CERTIFICATES_INSIDE.lstrip("/"))


def build(root: CleanRoot, stage: Stage, given: Mapping[str, str]) -> None:
    """Carry out the instructions of a stage.

    Args:
        root: its base.
        stage: to build.
        given: as by --build-arg.
    """
    files = context()
    for instruction in stage.instructions:
        root.environment = stage.after(instruction, root.environment, given)
        if instruction.name == "WORKDIR":
            root.directory = instruction.text
            (root.path / root.directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction.name == "USER":
            root.user = instruction.text
        elif instruction.name == "COPY":
            for file, where in copied(instruction, files).items():
                target = root.path / root.directory.lstrip("/") / where
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, target)
        elif instruction.name == "RUN":
            with timed(root, f"RUN {instruction.text}"):
                root.run(["sh", "-c", instruction.text])


def train(root: CleanRoot, command: Sequence[str], health: Sequence[str]) -> None:
    """Run CMD to its end, and the health check while it trains and while it is stopped.

    Raises:
        SystemExit: one of them was not as it ought to be.
    """
    process = root.start(command, {})
    try:
        healthy = {"MEGATRON_RW_HEALTH_SECONDS": "60"}
        while "the run made progress" not in (seen := root.beside(process, health, healthy)).stdout:
            if seen.returncode or process.poll() is not None:
                sys.exit(f"error: no run was seen: {seen.stdout}{seen.stderr}")
            time.sleep(1)
        report("while it trains", seen, 0)
        ranks = _ranks(process)
        users = {Path(f"/proc/{rank}").stat().st_uid for rank in ranks}
        print(f"    the processes of the run belong to user {users}", flush=True)
        if users != {int(root.user.split(":")[0])}:
            sys.exit(f"error: not to {root.user}")
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        time.sleep(12)
        stopped = root.beside(process, health, {"MEGATRON_RW_HEALTH_SECONDS": "10"})
        for rank in ranks:
            os.kill(rank, signal.SIGCONT)
        report("while it is stopped", stopped, 1)
        if process.wait() != 0:
            sys.exit(f"error: {shlex.join(command)}: exit status {process.returncode}")
    finally:
        process.kill()
        process.wait()


def report(when: str, result: subprocess.CompletedProcess[str], expected: int) -> None:
    """Print what the health check said, and stop where it is not what it ought to be."""
    print(
        f"    HEALTHCHECK {when}: status {result.returncode}, {result.stdout.strip()}", flush=True
    )
    if result.returncode != expected:
        sys.exit(f"error: the health check ought to have had status {expected}: {result.stderr}")


def _ranks(process: subprocess.Popen[str]) -> list[int]:
    """The processes of the training program in the namespace of `process`, by this side's ids."""
    namespace = os.readlink(f"/proc/{first_process(process)}/ns/pid")
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            words = (folder / "cmdline").read_bytes()
            if b"pretrain_gpt_rw.py" in words and os.readlink(folder / "ns/pid") == namespace:
                found.append(int(folder.name))
    return found


if __name__ == "__main__":
    sys.exit(main())
