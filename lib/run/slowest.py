"""Which rank the others wait for, when they wait long: a slow machine is named, not searched for."""

import platform

from lib.distributed import mesh, ranks, waits
from lib.run.output import Output

STEPS = 50  # over which waits are summed up, so that a batch that is longer on one rank does not count
SHARE = 0.1  # of the time of a step that the others must wait for one rank
SAY_EVERY = 500  # steps


class SlowestRank:
    """Says on the console which rank is slow, and on which machine. Every rank makes it."""

    def __init__(self, output: Output):
        self.output = output
        self._hosts = ranks.gather_on_rank0(platform.node())
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._said_at: int | None = None

    def note(self, step: int, steps: int, seconds: float) -> None:
        """The last `steps` steps, up to `step`, took so many seconds. Every rank must call it.

        The stages of a pipeline wait for each other by design, and are not compared.
        """
        waited = waits.take()
        if ranks.world_size() == 1 or mesh.pipeline_size() > 1:
            return
        self._steps, self._seconds, self._waited = self._steps + steps, self._seconds + seconds, self._waited + waited
        if self._steps < STEPS:
            return
        shares, summed = ranks.floats_on_rank0(self._waited / self._seconds), self._steps
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        if not shares or (self._said_at is not None and step - self._said_at < SAY_EVERY):
            return
        least = min(shares)
        others = (sum(shares) - least) / (len(shares) - 1) - least
        if others > SHARE:
            self._said_at = step
            slow = shares.index(least)
            self.output.say(
                f"slowest  rank {slow} ({self._hosts[slow]}): others wait {others * 100:.0f} % of a step for it "
                f"(the last {summed} steps)"
            )
