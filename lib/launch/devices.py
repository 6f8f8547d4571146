"""The devices of this machine that a run may use, and the options that tell DeepSpeed's launcher to take them.

Given a number of devices, DeepSpeed 0.19.8 ignores CUDA_VISIBLE_DEVICES (deepspeed/launcher/runner.py), and where torch
cannot use the machine's GPUs, DeepSpeed trains on the CPU. So here the devices are given by their ids, and GPUs that
cannot be used are an error. Devices are found without importing torch, which takes seconds, where that is safe.
"""

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError

HOSTFILE = Path("/job/hostfile")  # DeepSpeed's launcher reads this file without being asked to
# {major version of CUDA that torch may be built for: its oldest driver}. By NVIDIA's rules of CUDA compatibility, the
# minor versions of one major version share a driver.
OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
# Packages that add accelerators to torch. DeepSpeed looks for them too (deepspeed/accelerator/real_accelerator.py).
OTHER_ACCELERATORS = ("torch_npu", "torch_sdaa", "habana_frameworks", "torch_mlu", "torch_supa", "torch_xmlir")


@dataclass(frozen=True)
class Devices:
    """What a run may use.

    accelerator: DeepSpeed's name for the kind of device, such as "cuda".
    ids: the numbers by which DeepSpeed's launcher knows the devices, one for each rank; empty on a CPU.
    variable: the environment variable by which the user chose them, as "CUDA_VISIBLE_DEVICES=2,3"; else "".
    """

    accelerator: str
    ids: tuple[int, ...] = ()
    variable: str = ""

    @property
    def default_ranks(self) -> int:
        return len(self.ids) or 2

    def launcher_options(self, ranks: int) -> list[str]:
        """The options of the `deepspeed` command for this number of ranks on this machine.

        Raises UserError where there are fewer devices than ranks.
        """
        if self.ids and ranks > len(self.ids):
            raise UserError(
                f"--ranks is {ranks}, but there {_are_gpus(len(self.ids))}"
                f"{f' in {self.variable}' if self.variable else ''}"
            )
        # With the host file, the launcher would start as many ranks on each of the file's machines.
        hostfile = ["--hostfile", os.devnull] if HOSTFILE.is_file() else []
        if self.variable:
            return [*hostfile, "--include", f"localhost:{','.join(map(str, sorted(self.ids[:ranks])))}"]
        return [*hostfile, "--num_accelerators", str(ranks)]


@functools.cache
def find() -> Devices:
    """Find the devices. Sets DS_ACCELERATOR to their kind, unless they are NVIDIA's, so that DeepSpeed need not search.

    Raises UserError for a choice of devices that the launcher cannot pass on, and for GPUs that cannot be used.
    """
    found = _find()
    if found.accelerator != "cuda":
        os.environ.setdefault("DS_ACCELERATOR", found.accelerator)
    return found


def note_hostfile() -> None:
    """For a run on this machine alone, whose machine may be one of several: say how they are used."""
    if HOSTFILE.is_file():
        print(f"note: this machine alone; --hostfile {HOSTFILE} trains on all that it names", file=sys.stderr)


def _find() -> Devices:
    requested = os.environ.get("DS_ACCELERATOR", "")
    if requested == "cpu":
        return Devices("cpu")
    build = _torch_build()
    if (
        requested not in ("", "cuda")
        or build.get("hip")
        or build.get("xpu")
        or any(map(importlib.util.find_spec, OTHER_ACCELERATORS))
    ):
        name, count, variable = _ask(
            "from deepspeed.accelerator import get_accelerator; import json, os; "
            "a = get_accelerator(); v = a.visible_devices_envs()[0]; "
            "os.environ.pop(v, None); print(json.dumps([a._name, a.device_count(), v]))"
        )
        return Devices("cpu") if name == "cpu" else _chosen(name, count, variable)
    count, driver, has_mig = (0, "", False) if _hides_all(os.environ.get("CUDA_VISIBLE_DEVICES")) else _nvidia()
    if count == 0:
        if requested:
            raise UserError(
                f"DS_ACCELERATOR={requested}, but there is no NVIDIA GPU to use;"
                " leave it out, or set DS_ACCELERATOR=cpu"
            )
        if Path("/dev/kfd").exists():
            print(
                f"note: there is an AMD GPU here, but torch {build.get('__version__')} is not built for ROCm;"
                " training on the CPU",
                file=sys.stderr,
            )
        return Devices("cpu")
    cuda = build.get("cuda") or ""
    oldest = OLDEST_DRIVER.get(cuda.split(".")[0])
    # Where it is not sure that torch can use the GPUs, torch is asked, which takes 2 seconds.
    if has_mig or oldest is None or not driver or int(driver.split(".")[0]) < oldest:
        usable, visible = _ask(
            "import torch, json; print(json.dumps([torch.cuda.is_available(), torch.cuda.device_count()]))"
        )
        if not usable:
            why = (
                f"is built for CUDA {cuda}" + (f", which needs driver {oldest} or newer" if oldest else "")
                if cuda
                else "is built without CUDA"
            )
            raise UserError(
                f"there {_are_gpus(count)} here (driver {driver or 'unknown'}), but torch {build.get('__version__')}"
                f" cannot use {'it' if count == 1 else 'them'}: it {why}; "
                "update the driver, or install the torch that fits it (https://pytorch.org/get-started),"
                " or set DS_ACCELERATOR=cpu to train on the CPU"
            )
        count = visible if has_mig else count
    return _chosen("cuda", count, "CUDA_VISIBLE_DEVICES")


def _are_gpus(count: int) -> str:
    """The number of GPUs with its verb, to follow "there"."""
    return f"is {count} GPU" if count == 1 else f"are {count} GPUs"


def _hides_all(value: str | None) -> bool:
    """Whether this value of CUDA_VISIBLE_DEVICES hides every GPU from CUDA."""
    return value is not None and value.strip().split(",")[0] in ("", "-1", "NoDevFiles", "none", "void")


def _chosen(accelerator: str, count: int, name: str) -> Devices:
    """The devices that the environment variable `name` chooses out of `count`, or all. Raises UserError."""
    value = os.environ.get(name, "").replace(" ", "").rstrip(",")
    if not value:
        return Devices(accelerator, tuple(range(count)))
    if not re.fullmatch(r"\d+(,\d+)*", value):
        raise UserError(
            f"{name}={value}: DeepSpeed's launcher takes devices by number only (0 to {count - 1} here),"
            " no UUID and no part of one: write the numbers"
        )
    ids = tuple(map(int, value.split(",")))
    if max(ids) >= count or len(set(ids)) < len(ids):
        raise UserError(f"{name}={value}: there {_are_gpus(count)} here, numbered from 0; name each once, and no other")
    return Devices(accelerator, ids, f"{name}={value}")


def _torch_build() -> dict[str, str]:
    """The versions of torch and of what it is built for: {"__version__": "2.13.0", "cuda": "13.0"}; {} without torch.

    They are read from torch's source, because importing torch takes seconds.
    """
    spec = importlib.util.find_spec("torch")
    file = Path(spec.origin or "").with_name("version.py") if spec else Path()
    return (
        dict(re.findall(r"^(\w+).* = '(.*)'$", file.read_text(encoding="utf-8"), re.MULTILINE))
        if file.is_file()
        else {}
    )


def _nvidia() -> tuple[int, str, bool]:
    """(number of GPUs, their driver such as "580.65.06", "" if unknown, whether a GPU is cut into parts by MIG)."""
    table = _output("nvidia-smi", "--query-gpu=driver_version,mig.mode.current", "--format=csv,noheader").splitlines()
    lines = [line for line in table if line[:1].isdigit()]  # without GPUs, nvidia-smi prints a sentence
    count = len(lines) or sum(bool(re.fullmatch(r"nvidia\d+", node.name)) for node in Path("/dev").glob("nvidia*"))
    module = Path("/proc/driver/nvidia/version")
    driver = re.search(
        r"\b\d{3}\.\d+(\.\d+)?\b", lines[0] if lines else module.read_text(encoding="utf-8") if module.is_file() else ""
    )
    return count, driver.group() if driver else "", any("Enabled" in line for line in lines)


def _output(*command: str) -> str:
    """What a command prints; "" where the command does not exist or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _ask(code: str) -> list[Any]:
    """The JSON list that Python code prints last. It runs in its own process, whose end frees the memory torch takes.

    Raises UserError where the code fails.
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"the devices cannot be found: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    answer: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
