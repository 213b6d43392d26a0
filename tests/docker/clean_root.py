"""Run the Dockerfile's `cpu` target without Docker: its instructions in a clean Debian, its CMD.

    python -m tests.docker.clean_root FOLDER [NAME=VALUE as by --build-arg ...]

Where there is no container engine this comes nearest. debootstrap makes the Debian that FROM names;
then come the instructions, in a chroot with a process namespace of its own; then CMD as the image's
user; last the program's help as some other user. Needs root, debootstrap, 8 GB and a network.

Not the same: Debian of today rather than of the tag's day, no layers, no cgroups, this machine's
network and the certificates that it trusts.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from tests.docker.dockerfile import Stage, in_shell, read, write_context

# What Docker gives to a container whose image says nothing.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
OTHER_USER = "54321:54321"


def run(root: Path, user: str, script: str, *variables: str) -> None:
    """Runs a script in the root, with processes of its own that end with it."""
    isolated = [
        "unshare",
        "--mount",
        "--pid",
        "--fork",
        "--kill-child",
        f"--mount-proc={root}/proc",
    ]
    chroot = ["chroot", f"--userspec={user}", str(root), "env", "-i", f"PATH={PATH}"]
    subprocess.run([*isolated, *chroot, *variables, "sh", "-ec", script], check=True)


def prepare(root: Path, stage: Stage) -> None:
    """Makes the Debian that a stage starts from, with the network of this machine."""
    image = re.fullmatch(r"debian:([a-z]+)-\d+-slim AS .*", stage[0].text)
    assert image, f"FROM {stage[0].text}: only debian:SUITE-DATE-slim can be made here"
    debootstrap = ["debootstrap", "--variant=minbase", image[1], str(root)]
    subprocess.run(debootstrap, check=True, stdout=subprocess.DEVNULL)
    (root / "dev" / "shm").mkdir(exist_ok=True)
    (root / "dev" / "shm").chmod(0o1777)
    for name in ("resolv.conf", "hosts"):
        shutil.copy(f"/etc/{name}", root / "etc" / name)


def main() -> None:
    """Builds, runs and checks."""
    root, variables = Path(sys.argv[1]).resolve(), sys.argv[2:]
    if os.geteuid() != 0 or shutil.which("debootstrap") is None:
        sys.exit("error: needs root and debootstrap (apt-get install debootstrap)")
    if root.exists():
        sys.exit(f"error: {root} is there already")
    stage = read()["cpu"]
    texts = {name: text for name, text in stage if name in ("USER", "CMD")}
    command = shlex.join(json.loads(texts["CMD"]))
    # Those that hold for the processes of a container, too.
    begin = in_shell([i for i in stage if i.name in ("ENV", "WORKDIR")], Path())
    try:
        prepare(root, stage)
        write_context(root / "context")
        # A build host's own certificates, where it has some.
        if CERTIFICATES.exists():
            shutil.copy(CERTIFICATES, root / "etc")
            variables.append(f"PIP_CERT=/etc/{CERTIFICATES.name}")
        run(root, "0:0", in_shell(stage, Path("/context")), *variables)
        run(root, texts["USER"], f"{begin}\n{command}")
        help_text = "python pretrain_gpt_rw.py --help > /runs/help.txt && touch ~/own"
        run(root, OTHER_USER, f"{begin}\n{help_text}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: it failed with status {error.returncode}")
    finally:
        shutil.rmtree(root, ignore_errors=True)


if __name__ == "__main__":
    main()
