"""A SLURM cluster of two nodes on this machine, real but for its hardware.

Needs Debian's slurm-wlm and munge. A head node runs slurmctld; each compute node has its own
address, host name, /etc/hosts and processes, all of which end at once when it is killed. Nothing of
it touches /etc or a cluster that is there already, and nothing is left when it ends.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.hosts import connected_hosts, plug

HEAD, NODES = "rw-head", ("rw-n1", "rw-n2")
ADDRESSES = {HEAD: "10.231.8.1", "rw-n1": "10.231.8.2", "rw-n2": "10.231.8.3"}
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare")
PATIENCE_S = 60.0

# A node that is silent for 15 s is down; it is in use again as soon as it is back. A requeued job
# waits for the lifetime of its credential, 120 s by default.
CONFIGURATION = """
ClusterName=rw
SlurmctldHost={head}({address})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=5
ReturnToService=2
SlurmdTimeout=15
KillWait=10
SlurmdParameters=config_overrides
NodeName={nodes} CPUs=2 Sockets=1 CoresPerSocket=2 ThreadsPerCore=1
PartitionName=main Nodes={nodes} Default=YES
"""
# The first process of a host. It stays, to reap what becomes its child: SLURM counts zombies.
HOST = """
set -e
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
shift 2
"$@" || exit
"""


def wait_until(reached: Callable[[], bool], failed: Callable[[], str], seconds: float) -> None:
    """Waits until something is the case; ends the program with a message if it is not in time."""
    deadline = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > deadline:
            raise SystemExit(f"error: not within {seconds:.0f} s: {failed()}")
        time.sleep(0.2)


class Cluster:
    """A cluster whose configuration, state and logs are in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts all daemons, and waits until the nodes are ready."""
        for folder in ("state", *(f"spool-{node}" for node in NODES)):
            (self._folder / folder).mkdir()
        (self._folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                head=HEAD, address=ADDRESSES[HEAD], folder=self._folder, nodes=",".join(NODES)
            )
        )
        # Not detected, the plugin is content with there being no control groups.
        (self._folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        lines = [f"{address} {host}" for host, address in ADDRESSES.items()]
        (self._folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        self._munge()
        self._spawn(HEAD, self._on(HEAD, ["slurmctld", "-D", "-i"]))
        for node in NODES:
            self.boot(node)
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        """Waits until all nodes may be given to jobs."""

        def states() -> list[str]:
            return self.run("sinfo", "--noheader", "--Node", "--format=%T", check=False).split()

        self._wait_until(lambda: states() == ["idle"] * len(NODES), "the nodes are not idle")

    def boot(self, node: str) -> None:
        """Starts a node, or starts it again."""
        plug(node, in_place=True)
        self._spawn(node, self._on(node, ["slurmd", "-D"]))

    def kill(self, node: str) -> None:
        """Ends a node as a power failure would: no packet leaves it, and no process of it lives."""
        plug(node, in_place=False)
        self._end(node)

    def run(self, *command: str, check: bool = True, **environment: str) -> str:
        """Runs a command on the head node, and returns what it prints."""
        every = os.environ | {"SLURM_CONF": str(self._folder / "slurm.conf")} | environment
        return subprocess.run(
            self._on(HEAD, command), env=every, text=True, check=check, stdout=subprocess.PIPE
        ).stdout

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        ends = []
        for log in sorted(self._folder.glob("*.log")):
            ends += [f"--- {log.name}", *log.read_text().splitlines()[-20:]]
        return "\n".join(ends)

    def stop(self) -> None:
        """Ends all of it."""
        for name in list(self._daemons):
            self._end(name)

    def _munge(self) -> None:
        # It insists that others could reach its socket.
        self._folder.chmod(0o711)
        key = self._folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = [f"--{name}-file={self._folder}/munge.{name}" for name in ("key", "log", "pid")]
        files = [*files, f"--seed-file={self._folder}/munge.seed"]
        socket = self._folder / "munge.socket"
        self._spawn("munge", ["munged", "--foreground", f"--socket={socket}", *files])
        self._wait_until(socket.exists, "munged did not start")

    def _wait_until(self, reached: Callable[[], bool], problem: str) -> None:
        wait_until(reached, lambda: f"{problem}\n{self.logs()}", PATIENCE_S)

    def _on(self, host: str, command: Sequence[str]) -> list[str]:
        apart = "unshare --mount --uts --pid --fork --kill-child --mount-proc sh -c".split()
        inside = [*apart, HOST, "sh", host, str(self._folder), *command]
        return ["ip", "netns", "exec", host, *inside]

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with (self._folder / f"{name}.out.log").open("ab") as log:
            environment = os.environ | {"SLURM_CONF": str(self._folder / "slurm.conf")}
            self._daemons[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster, up to the end of the block."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing or os.geteuid() != 0:
        raise SystemExit(
            f"error: a cluster needs root, and {', '.join(missing) or 'nothing else'}: "
            "apt-get install slurm-wlm munge iproute2"
        )
    with tempfile.TemporaryDirectory(prefix="rw-slurm-") as name, connected_hosts(ADDRESSES):
        cluster = Cluster(Path(name))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
