"""A recipe's command line: from its arguments to main(), and the end of the process."""

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch.distributed

from lib.distributed import memory, ranks
from lib.errors import EXIT_SECONDS, FAULT, INTERRUPTED, MISTAKE, OutOfMemory, Stopped, UserError
from lib.run.console import Console
from lib.settings.config import parse
from lib.settings.ds_config import load_ds_config


def cli(main: Callable[..., Any], config_class: type[Any]) -> None:
    """Run a recipe from the command line: read the settings, check the DeepSpeed JSON against them, call `main(cfg,
    ds_config)`.

    A UserError is one line on rank 0, a bug a traceback; the exit codes are those of lib/errors.py.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    recipe = sys.modules[main.__module__].__file__ or ""
    console = Console(os.dup(2))  # a run sends the process's own output to its log; errors must still be seen
    try:
        cfg, ds_path = parse(config_class, recipe, sys.argv[1:])
        train(main, cfg, load_ds_config(ds_path, cfg, world_size))
        torch.distributed.destroy_process_group()
    except Stopped as stopped:
        if rank == 0:
            print(stopped, file=console)
        leave(stopped.code)
    except UserError as error:
        if rank > 0:  # rank 0, however busy its machine, says it first; then the launcher ends this process
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(20)
        print(f"error: {f'rank {rank}: ' if rank else ''}{' '.join(str(error).split())}", file=console)
        leave(FAULT if isinstance(error, OutOfMemory) else MISTAKE)
    except KeyboardInterrupt:  # before training; from then on it saves and stops
        leave(INTERRUPTED)
    except Exception as error:
        lost = ranks.lost_contact(error)
        if lost:
            if rank < 2:  # one of them is not the one that was lost
                print(
                    f"error: rank {rank} lost contact with another rank ({lost}), which has ended or does not answer",
                    file=console,
                )
        elif any(reason in str(error) for reason in ("No space left on device", "Disk quota exceeded")):
            print(f"error: rank {rank}: {' '.join(str(error).split())}; make room, then --resume goes on", file=console)
        else:
            print(traceback.format_exc(), file=console)
        leave(FAULT)
    leave(0)


def train(main: Callable[..., Any], cfg: Any, ds_config: dict[str, Any]) -> None:
    """Call main(cfg, ds_config). Raises OutOfMemory where the memory does not suffice, and leaves the traceback in the
    log."""
    try:
        main(cfg, ds_config)
    except Exception as error:
        if memory.is_out_of_memory(error):
            traceback.print_exc()
            raise OutOfMemory(memory.answer(error, cfg, ds_config)) from None
        raise


def leave(code: int) -> NoReturn:
    """End this process now: run the exit functions, where monitors end their uploads, but not the interpreter's own
    shutdown.

    It waits for process groups that other ranks have left, and aborts (exit code -6) where a thread of gloo drops a
    tensor meanwhile.
    """
    # An upload without a network would keep the process for ever.
    exit_functions = threading.Thread(target=atexit._run_exitfuncs, daemon=True)
    exit_functions.start()
    exit_functions.join(EXIT_SECONDS)
    with contextlib.suppress(OSError, ValueError):  # a full disk, a terminal that has closed
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
