"""Each form of parallelism on two hosts trains as on one machine, within a host and across both."""

from pathlib import Path

import pytest
from conftest import ALL
from machine_runs import RECIPE, Hosts, alike, end, one_machine, start

STEPS = ["--max_steps", "6"]
PIPELINE = ["pipeline_lm", "--quick", "--log_every", "1"]
MIXTURE = ["--architecture", "mixtral", "--num_experts", "4"]
# (recipe, config, ranks on each host, more settings): with 1 rank a group is on both hosts, with 2 it is within one.
ALWAYS: list[tuple[list[str], str, int, list[str]]] = [(RECIPE, "sp2_zero3", 1, [])]
MORE: list[tuple[list[str], str, int, list[str]]] = [
    (RECIPE, "zero3", 1, []), (RECIPE, "tp2_zero1", 2, []), (RECIPE, "sp2_zero3", 2, []),
    (RECIPE, "ep2_zero2", 2, MIXTURE), (PIPELINE, "zero1", 2, []),
    (PIPELINE, "zero1", 1, []), (PIPELINE, "pp4_zero1", 2, []),
    (RECIPE, "tp2_zero1", 1, []), (RECIPE, "ep2_zero2", 1, MIXTURE),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "config", "ranks", "more"), ALWAYS + MORE * ALL, ids=lambda value: value if type(value) is str else ""
)
def test_two_machines_train_as_one(
    hosts: Hosts, shared: Path, recipe: list[str], config: str, ranks: int, more: list[str]
) -> None:
    settings = [*STEPS, *more]
    both = start(
        hosts, *settings, "--ds_config", config, "--ranks", ranks, "--run_dir", shared / "two", recipe=recipe
    )  # fmt: skip
    codes, printed = end(both, hosts, 300)
    assert codes == [0, 0], printed
    # On one machine without the form: with one rank, or with a pipeline of two.
    alone, plain = (2, "zero0") if recipe is PIPELINE else (1, "zero0")
    assert alike(shared / "two", one_machine(alone, shared / "one", *settings, recipe=recipe, config=plain))


@pytest.mark.slow
@pytest.mark.skipif(not ALL, reason="test_machines.py has more machines")
def test_a_hostfile_may_name_one_machine(hosts: Hosts, shared: Path) -> None:
    (shared / "hostfile").write_text("beta slots=2\n")
    command = ["./launch.sh", *RECIPE, *STEPS, "--hostfile", shared / "hostfile", "--run_dir", shared / "1x2"]
    codes, printed = end([hosts[0].start(*command)], hosts)
    assert codes == [0], printed
    assert alike(shared / "1x2", one_machine(1, shared / "one", *STEPS))
