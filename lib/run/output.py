"""What a run says on the console of rank 0, and the log files for whatever libraries print."""

import os
import platform
import sys
from pathlib import Path

from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from lib.distributed import ranks
from lib.progress import Work
from lib.run.console import Console
from lib.run.signs import Signs

PLAIN_LINES = 10  # progress lines of a whole run where the console is no terminal


def log_name() -> str:
    """log.txt on the machine of rank 0, and log-<host>.txt on each other one: machines that append to one file of a
    network's disk overwrite each other's lines."""
    node = os.environ.get("CROSS_RANK", os.environ.get("GROUP_RANK", "0"))  # by DeepSpeed's launcher, by torchrun
    return "log.txt" if node == "0" else f"log-{platform.node()}.txt"


class Output:
    """The console, for `say` and the progress. From here on, all else that this process prints goes to the log."""

    def __init__(self, log: Path):
        sys.stdout.flush()
        sys.stderr.flush()
        self._before = sys.stdout, sys.stderr
        self._stdout, self._stderr = os.dup(1), os.dup(2)
        self._console = Console(self._stdout)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(self._log, 1)
        os.dup2(self._log, 2)
        sys.stdout, sys.stderr = Console(1), Console(2)  # which a full disk does not make raise
        transformers_logging.disable_progress_bar()
        self.signs = Signs(self._console) if ranks.rank() == 0 else None
        self._bar: tqdm[None] | None = None
        self.set_phase(Work("starting"))

    def say(self, text: str = "") -> None:
        """Print on rank 0's console."""
        if self.signs is not None:
            if self._bar is not None:
                self._bar.clear()
            self.signs.print(text)

    def set_phase(self, work: Work | None) -> None:
        """What the console shows after a long silence when no `progress` is running."""
        if self.signs is not None:
            self.signs.phase = work

    def begin_steps(self, done: int, total_steps: int) -> None:
        """From here on show the steps: as a bar on a terminal, elsewhere as a line every so often."""
        if self.signs is not None and self._console.isatty():
            layout = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"  # tqdm's time left counts what is no step
            self._bar = tqdm(
                total=total_steps, initial=done, file=self._console, bar_format=layout, dynamic_ncols=True, leave=True
            )
            self.signs.bar = self._bar
        self.set_phase(None if self._bar is not None else Work("training", total_steps - done, "steps"))

    def count_step(self) -> None:
        """A step is done, though its figures may not be known yet."""
        if self.signs is not None and self.signs.phase is not None:
            self.signs.phase.advance(1)

    def wants_progress(self, step: int, new_steps: int, total_steps: int) -> bool:
        """Whether figures of the last new_steps steps are to be shown now: on a terminal always."""
        tenth, tenth_before = (number * PLAIN_LINES // total_steps for number in (step, step - new_steps))
        return ranks.rank() == 0 and (self._bar is not None or tenth > tenth_before)

    def show_progress(self, step: int, new_steps: int, total_steps: int, figures: str) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(figures, refresh=False)
            self._bar.update(new_steps)
        else:
            self.say(f"step {step}/{total_steps}  {figures}")

    def end_steps(self) -> None:
        self.set_phase(Work("after the last step"))
        if self.signs is not None and self._bar is not None:
            self.signs.bar = None
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Give the process its own output back."""
        if self.signs is not None:
            self.signs.close()
        sys.stdout, sys.stderr = self._before
        os.dup2(self._stdout, 1)
        os.dup2(self._stderr, 2)
        for descriptor in (self._stdout, self._stderr, self._log):
            os.close(descriptor)
