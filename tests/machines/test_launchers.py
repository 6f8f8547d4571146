"""Lines of docs/machines.md for other launchers than ours, run word by word on the two hosts."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ALL, ROOT
from machine_runs import RECIPE, Hosts, alike, end, one_machine, process_of, wait, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not ALL, reason="test_machines.py has the launchers of our own")]
STEPS, LONG = ["--max_steps", "6"], ["--max_steps", "200"]


def test_torchrun(hosts: Hosts, shared: Path) -> None:
    (line,) = re.findall(r"`(torchrun .*?)`", (ROOT / "docs" / "machines.md").read_text())
    line = line.replace("--nproc_per_node 8", "--nproc_per_node 1").replace("/shared/", f"{shared}/")
    both = [
        host.start(*line.replace("--node_rank 0", f"--node_rank {number}").split(), *RECIPE[1:], *STEPS)
        for number, host in enumerate(hosts)
    ]
    codes, printed = end(both, hosts)
    assert codes == [0, 0], printed
    assert alike(shared / "run", one_machine(1, shared / "one", *STEPS))


def test_the_command_of_kubernetes(hosts: Hosts, shared: Path) -> None:
    """With the environment that an indexed Job sets. The first pod has no name yet; then the second is drained."""
    text = (ROOT / "docs" / "cluster" / "kubernetes.yaml").read_text().replace("/shared/", f"{shared}/")
    service, _, job = yaml.safe_load_all(text)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    values = {variable["name"]: variable["value"] for variable in container["env"]}
    first_pod = f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert values["MASTER"] == first_pod and pod["subdomain"] == service["metadata"]["name"]
    assert int(values["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"] == len(hosts)
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    words = [*container["command"], *container["args"], *RECIPE[1:], *LONG, "--stage", "2", "--ranks", "1"]
    environment = [f"{name}={value}" for name, value in values.items()]

    def pods() -> list[subprocess.Popen[str]]:
        return [
            host.start("env", f"JOB_COMPLETION_INDEX={number}", *environment, *words)
            for number, host in enumerate(hosts)
        ]

    both = pods()
    wait(lambda: all(host.processes("sleep 1") for host in hosts), both)
    for host in hosts:
        assert host.run("sh", "-c", f"echo {hosts[0].address} {first_pod} >> /etc/hosts").returncode == 0
    run = shared / "runs" / "long"
    wait_for(run, 5, both)
    os.kill(process_of(hosts[1], "lib.launch.supervise"), signal.SIGTERM)
    codes, printed = end(both, hosts)
    assert codes == [75, 75], printed
    codes, printed = end(pods(), hosts)
    assert codes == [0, 0], printed
    assert alike(run, one_machine(2, shared / "one", *LONG))
