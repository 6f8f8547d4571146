"""Two real hosts on this machine: namespaces with an own network, hostname, process table, /tmp and sshd, one switch.

    with two_hosts() as (alpha, beta):
        alpha.run("./launch.sh", ...)                 wait for a command on this host
        process = beta.start("./launch.sh", ...)      or do not
        beta.cut(), beta.mend()                       its cable at the switch: both ends still have a carrier
        beta.processes()                              what runs there, known by its namespace

The hosts see the file system of this machine, but for /tmp, /dev/shm, /run, /etc/hosts and the files of ssh. Each is
the first process of a process namespace: when it ends, the kernel ends all others there, and the network goes too.
"""

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
NAMES = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
SSH_PORT = 2222
NEEDED = ("setpriv", "unshare", "nsenter", "ip", "bridge", "sshd", "ssh", "ssh-keygen", "mount")
# A host has these folders of the machine, even where they are below one that it has for itself.
SHARED = (ROOT, Path(sys.prefix).resolve())

# What is started by this ends with the process that starts it, even when that is killed.
WITH_US = ("setpriv", "--pdeathsig", "KILL")

# The first process of a host. Debian writes `127.0.1.1 <own name>` into /etc/hosts, by which gloo takes the loopback.
BOOT = """
set -e
hostname {name}
ip link set lo up
mount --make-rprivate /
mkdir -p {folder}/old-tmp
mount --bind /tmp {folder}/old-tmp
mount -t tmpfs tmpfs /tmp
{keep}
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/../ssh_config /etc/ssh/ssh_config
{sshd} -f {folder}/../sshd_config -E {folder}/sshd.log
touch {folder}/up
exec sleep infinity
"""


def missing() -> str | None:
    """Why this machine cannot have such hosts; None where it can."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [program for program in NEEDED if shutil.which(program, path=path) is None]
    if absent:
        return f"no {', '.join(absent)} here; on Debian: apt install openssh-server openssh-client iproute2 util-linux"
    if os.geteuid() != 0:
        return "namespaces with addresses of their own need root"
    command = [
        "unshare",
        "--net",
        "--uts",
        "--pid",
        "--mount",
        "--fork",
        "ip",
        "link",
        "add",
        "name",
        "test0",
        "type",
        "bridge",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return f"this system allows no namespaces: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return None


class Host:
    """One host: the first process of its namespaces, `init`."""

    def __init__(self, name: str, init: int, switch: int):
        self.name, self.address, self.init, self.switch = name, NAMES[name], init, switch
        self.namespace = Path(f"/proc/{init}/ns/pid").readlink()

    def command(self, *words: Any, cwd: Path | str = ROOT) -> list[str]:
        """The command on this machine that runs these words on the host, as a login there would."""
        path = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"
        enter = ["nsenter", f"--target={self.init}", "--net", "--uts", "--pid", "--mount", f"--wd={cwd}"]
        environment = {"PATH": path, "HOME": "/tmp", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "LANG": "C.UTF-8"}
        environment |= {name: os.environ[name] for name in ("HF_HOME", "XDG_CACHE_HOME") if name in os.environ}
        return [*enter, "env", "-i", *(f"{k}={v}" for k, v in environment.items()), *map(str, words)]

    def run(self, *words: Any, timeout: float = 300, cwd: Path | str = ROOT) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words, cwd=cwd), capture_output=True, text=True, timeout=timeout, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def start(self, *words: Any, cwd: Path | str = ROOT) -> subprocess.Popen[str]:
        """Start a command in a session of its own, as in a terminal of its own."""
        return subprocess.Popen(
            self.command(*words, cwd=cwd), text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def processes(self, *words: str) -> dict[int, str]:
        """{id on this machine: command line} of all processes on the host whose command lines have these words, but
        its first process and sshd."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has ended
                if (folder / "ns" / "pid").readlink() == self.namespace:
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(folder.name)] = line.strip()
        own = ("sleep infinity", "sshd: ")
        return {
            number: line
            for number, line in found.items()
            if line and not line.startswith(own) and "sshd" not in line.split()[0] and all(w in line for w in words)
        }

    def is_gone(self) -> bool:
        return not Path(f"/proc/{self.init}").exists()

    def _port(self, *words: str) -> None:
        subprocess.run(["nsenter", f"--target={self.switch}", "--net", *words], check=True)

    def cut(self) -> None:
        """From now on the switch drops what comes from the host and what goes to it."""
        self._port("bridge", "link", "set", "dev", self.name, "state", "0")

    def mend(self) -> None:
        self._port("bridge", "link", "set", "dev", self.name, "state", "3")


def _write_ssh_files(folder: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "host_key"], check=True)
    (folder / "authorized_keys").write_text((folder / "key.pub").read_text())
    (folder / "sshd_config").write_text(
        f"Port {SSH_PORT}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/authorized_keys\nPidFile none\n"
        "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nStrictModes no\nMaxStartups 100\n"
        "Subsystem sftp internal-sftp\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  Port {SSH_PORT}\n  IdentityFile {folder}/key\n  UserKnownHostsFile {folder}/known_hosts\n"
        "  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"
    )


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Start both hosts, and end all that runs on them at the end."""
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/var/tmp"))  # /tmp is each host's own
    folder.chmod(0o755)
    first: list[subprocess.Popen[bytes]] = []
    try:
        _write_ssh_files(folder)
        first.append(subprocess.Popen([*WITH_US, "unshare", "--net", "sleep", "infinity"]))
        switch = first[0].pid
        _wait(lambda: Path(f"/proc/{switch}/ns/net").readlink() != Path("/proc/self/ns/net").readlink())
        in_switch = ["nsenter", f"--target={switch}", "--net"]
        for words in ("ip link add switch type bridge", "ip link set switch up"):
            subprocess.run([*in_switch, *words.split()], check=True)
        hosts = []
        for name, address in NAMES.items():
            own = folder / name
            own.mkdir()
            others = "".join(f"{a} {n}\n" for n, a in NAMES.items() if n != name)
            (own / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{others}")
            keep = "".join(
                f"mkdir -p {shlex.quote(str(path))}\nmount --bind {own}/old-tmp/{shlex.quote(str(path)[5:])} "
                f"{shlex.quote(str(path))}\n"
                for path in SHARED
                if path.is_relative_to("/tmp")
            )
            script = BOOT.format(name=name, folder=own, keep=keep, sshd=shutil.which("sshd"))
            namespaces = ["--net", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child"]
            starter = subprocess.Popen([*WITH_US, "unshare", *namespaces, "sh", "-c", script])
            first.append(starter)
            _wait(lambda own=own: (own / "up").exists())
            init = int(Path(f"/proc/{starter.pid}/task/{starter.pid}/children").read_text().split()[0])
            for words in (
                f"ip link add {name} type veth peer name eth0 netns {init}",
                f"ip link set {name} master switch",
                f"ip link set {name} up",
            ):
                subprocess.run([*in_switch, *words.split()], check=True)
            host = Host(name, init, switch)
            for words in (f"ip address add {address}/24 dev eth0", "ip link set eth0 up"):
                subprocess.run(["nsenter", f"--target={init}", "--net", *words.split()], check=True)
            hosts.append(host)
        alpha, beta = hosts
        yield alpha, beta
    finally:
        for process in reversed(first):
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _wait(what: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError("a host did not start")
        time.sleep(0.05)
