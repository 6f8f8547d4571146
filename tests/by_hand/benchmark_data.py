"""What preparing a large corpus costs, and how long a training step waits for its rows. Run by hand:

    python tests/by_hand/benchmark_data.py make /tmp/corpus --gigabytes 2
    python tests/by_hand/benchmark_data.py prepare /tmp/corpus --beside ../older
    python tests/by_hand/benchmark_data.py wait causal_lm --max_steps 60
    python tests/by_hand/benchmark_data.py wait causal_lm --max_steps 60 --dataset /tmp/corpus --streaming

`make` writes JSONL: paragraphs of the samples sotu and docstring_pairs in another order in each document, with another
number at the front of each. `prepare` reads, splits, tokenizes and joins it in fresh processes with an empty cache, in
each checkout, and prints seconds, tokens a second and peak memory. `wait` trains a recipe on 2 ranks and prints the
share of a step in which rank 0 waits for the rows of the next one.
"""

import argparse
import functools
import importlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # after PYTHONPATH, which may name another checkout


def make(folder: Path, gigabytes: float, files: int = 4) -> None:
    from lib.data.samples import load_sample

    texts = [*load_sample("sotu")["train"]["text"], *load_sample("docstring_pairs")["train"]["body"]]
    paragraphs = [part for text in texts for part in text.split("\n\n") if part.strip()]
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        written = 0
        with (folder / f"part-{number}.jsonl").open("w", encoding="utf-8") as file:
            while written < gigabytes * 1e9 / files:
                count = int(draw.lognormvariate(1.5, 1.0)) + 1
                chosen = draw.choices(paragraphs, k=count)
                text = "\n\n".join(f"{draw.randrange(10**6)} {paragraph}" for paragraph in chosen)
                written += file.write(json.dumps({"text": text}) + "\n")


def prepare_here(folder: Path, vocab_size: int) -> None:
    """In this process and its working folder's lib, as the only rank, with the cache that the environment names."""
    from lib.data.blocks import token_streams
    from lib.data.rows import load_rows
    from lib.data.samples import load_sample
    from lib.distributed import ranks
    from lib.models import scratch

    ranks.init(timeout_minutes=10)
    tokenizer = scratch.train_tokenizer(load_sample("sotu")["train"]["text"], vocab_size, scratch.END_OF_TEXT)
    own = [0]  # bytes of this process without the files that it maps, which the kernel takes back when it needs room

    def watch() -> None:
        while True:
            memory = psutil.Process().memory_info()
            own.append(memory.rss - memory.shared)
            time.sleep(0.2)

    threading.Thread(target=watch, daemon=True).start()
    started = time.monotonic()
    splits = load_rows(str(folder), None, text={"text": "text"})
    read = time.monotonic()
    tokens = sum(map(len, token_streams(splits, tokenizer).values()))
    ended = time.monotonic()
    resident = 2**10 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"rows {read - started:.1f} s, tokens {ended - read:.1f} s, {tokens:,} tokens, "
        f"{tokens / (ended - started):,.0f} tokens/s in all, peak {resident / 2**20:,.0f} MiB, "
        f"{max(own) / 2**20:,.0f} of them without mapped files, {splits.fingerprint}",
        flush=True,
    )


def prepare(folder: Path, beside: list[Path], vocab_size: int) -> None:
    for checkout in [*beside, ROOT]:
        with tempfile.TemporaryDirectory(dir=folder.parent) as cache:
            environment = {"HF_DATASETS_CACHE": cache, "PYTHONPATH": str(checkout.resolve()), "DS_ACCELERATOR": "cpu"}
            command = [sys.executable, __file__, "prepare_here", str(folder), "--vocab_size", str(vocab_size)]
            print(f"{checkout.resolve().name}: ", end="", flush=True)
            subprocess.run(command, env=os.environ | environment, check=True)


def wait_here(recipe: str, arguments: list[str]) -> None:
    """One rank of the recipe. Prints how long `next` of its batches took, beside whole steps."""
    from lib.data import batches
    from lib.run.cli import cli

    real, found = batches.training_batches, []

    @functools.wraps(real)
    def timed(*given: Any, **options: Any) -> Iterator[Any]:
        made = real(*given, **options)
        before = time.perf_counter()
        while True:
            asked = time.perf_counter()
            batch = next(made)
            ready = time.perf_counter()
            found.append((ready - asked, ready - before))
            before = ready
            yield batch

    batches.training_batches = timed
    module = importlib.import_module(f"recipes.{recipe}")
    sys.argv = [str(ROOT / "recipes" / f"{recipe}.py"), *arguments]

    def main(cfg: Any, ds_config: dict[str, Any]) -> None:
        module.main(cfg, ds_config)
        if os.environ["RANK"] == "0":
            waits, steps = zip(*found[5:], strict=True)  # the first five are not like the others
            print(
                f"{recipe}: a step takes {1000 * sum(steps) / len(steps):.1f} ms, of which it waits for rows "
                f"{1000 * sum(waits) / len(waits):.2f} ms ({sum(waits) / sum(steps):.2%}; at most "
                f"{1000 * max(waits):.1f} ms; {len(steps)} steps)",
                file=sys.__stderr__,
                flush=True,
            )

    main.__module__ = module.__name__
    cli(main, module.Config)


def wait(recipe: str, arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ds_config = ROOT / "ds_configs" / recipe / "zero2.json"
        own = ["--deepspeed_config", str(ds_config), "--run_dir", f"{folder}/run", "--save_minutes", "null"]
        launcher = Path(sys.executable).with_name("deepspeed")
        command = [str(launcher), "--quiet", "--num_accelerators", "2", __file__, "wait_here", recipe]
        environment = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
        subprocess.run([*command, *own, *arguments], env=os.environ | environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "prepare", "prepare_here", "wait", "wait_here"])
    parser.add_argument("of", help="the corpus, or for `wait` a recipe, whose own arguments follow")
    parser.add_argument("--gigabytes", type=float, default=2)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--beside", type=Path, action="append", default=[], help="another checkout, which comes first")
    arguments = [part for part in sys.argv[1:] if not part.startswith("--local_rank")]
    options, others = parser.parse_known_args(arguments)
    folder = Path(options.of)
    do: dict[str, Callable[[], None]] = {
        "make": lambda: make(folder, options.gigabytes),
        "prepare": lambda: prepare(folder, options.beside, options.vocab_size),
        "prepare_here": lambda: prepare_here(folder, options.vocab_size),
        "wait": lambda: wait(options.of, others),
        "wait_here": lambda: wait_here(options.of, others),
    }
    do[options.what]()


if __name__ == "__main__":
    main()
