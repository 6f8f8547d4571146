"""Memory and time of a language model's loss: by whole logits, by pieces (lib/models/output_layer.py), by torch's own.

    python tests/by_hand/benchmark_output_layer.py      # a few minutes

Each row is a process of its own: forward and backward pass of a decoder of two narrow layers on one batch, whose logits
are what costs. The peak is that of the process, less what it had before the first pass. `torch` is
torch.nn.functional.linear_cross_entropy, which computes gradients in the forward pass, as if all labels counted alike:
dpo's do not.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lib.models import output_layer
from lib.models.losses import token_losses

HOW = ("whole", "pieces", "torch")
VOCABULARIES, LENGTH, STEPS = (4096, 49_152, 151_936), 1024, 3


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, how: str) -> torch.Tensor:
    if how == "whole":
        return token_losses(model(input_ids=ids).logits.float(), labels).sum()
    if how == "pieces":
        with output_layer.losses_for(model, labels) as losses_in:
            return losses_in(model(input_ids=ids)).sum()
    hidden = model.model(input_ids=ids).last_hidden_state.flatten(0, 1)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, model.lm_head.weight, labels.flatten(), reduction="sum", options=options)


def measure(how: str, vocabulary: int, rows: int) -> dict[str, float]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes, tie_word_embeddings=True, use_cache=False))
    ids = torch.randint(vocabulary, (rows, LENGTH))
    labels = ids.roll(-1, 1)
    torch.autograd.backward(loss_of(model, ids[:, :8], labels[:, :8], how))  # the gradients are there from now on
    before, seconds, loss = peak_kb(), list[float](), torch.zeros(())
    for _ in range(STEPS):
        started = time.perf_counter()
        loss = loss_of(model, ids, labels, how)
        torch.autograd.backward(loss / labels.numel())
        seconds.append(time.perf_counter() - started)
    return {
        "peak_gb": (peak_kb() - before) / 1e6, "seconds": statistics.median(seconds),
        "loss": float(loss.detach()) / labels.numel(),
    }  # fmt: skip


def peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4, help=f"of {LENGTH} tokens (default: 4)")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]), options.rows)))
        return
    print(f"{options.rows} rows of {LENGTH} tokens, {os.cpu_count()} cores, torch {torch.__version__}")
    for vocabulary in VOCABULARIES:
        for how in HOW:
            command = [sys.executable, __file__, "--rows", str(options.rows), "--one", how, str(vocabulary)]
            found = json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            print(
                f"{vocabulary:>8} tokens  {how:<7} {found['peak_gb']:6.2f} GB  {found['seconds']:6.2f} s a step  "
                f"loss {found['loss']:.6f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
