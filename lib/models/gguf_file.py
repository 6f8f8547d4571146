"""A language model as one GGUF file, for llama.cpp and what is built on it.

It writes what llama.cpp's convert_hf_to_gguf.py writes, for Llama and Qwen models with byte-level BPE tokenizers, and
refuses what it does not know: a file that loads and then answers wrongly is worse than none.
"""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lib.errors import UserError

ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
LLAMA3_SPLIT, QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    + digits
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in (r"\p{N}{1,3}", r"\p{N}")
)
REMEDY = "llama.cpp's convert_hf_to_gguf.py may know it; it takes a whole model (./launch.sh merge makes one of LoRA)"


def write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, dtype: str, name: str) -> None:
    """Write the model with its tokenizer and chat template.

    dtype: of the matrices, one of FILE_TYPES; other weights are fp32. Raises UserError where llama.cpp would read the
    file as something else.
    """
    check(model.config.to_dict())
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[model.config.model_type]])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_config(writer, model.config)
    _add_tokenizer(writer, tokenizer, model)
    _add_weights(writer, model, gguf.GGMLQuantizationType[dtype.upper()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check(config: dict[str, Any]) -> None:
    """Raise a UserError where a model with this config cannot be written."""
    kind, rope = config.get("model_type"), config.get("rope_parameters") or config.get("rope_scaling") or {}
    if kind not in ARCHITECTURES:
        raise UserError(f"a model of type {kind} is not written as GGUF ({', '.join(ARCHITECTURES)} are); {REMEDY}")
    usual = {
        "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
        "rope_type": "default", "partial_rotary_factor": 1, "quantization_config": None,
    }  # fmt: skip
    for key, value in usual.items():
        if (found := config.get(key, rope.get(key))) not in (None, value):
            raise UserError(f"a {kind} model with {key} {found} is not written as GGUF; {REMEDY}")


def _add_config(writer: gguf.GGUFWriter, config: Any) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def pre_tokenizer_name(tokenizer: dict[str, Any]) -> str:
    """The name under which llama.cpp has, in its code, this tokenizer's way to cut a text into words before BPE.

    tokenizer: a tokenizer.json. Raises UserError for a tokenizer that llama.cpp would not read as it is.
    """
    bpe, first = tokenizer["model"], tokenizer["pre_tokenizer"] or {"type": None}
    cuts, last = first.get("pretokenizers", [first])[:-1], first.get("pretokenizers", [first])[-1]
    cut = [(step["type"], step.get("individual_digits") or step.get("pattern", {}).get("Regex")) for step in cuts]
    name = {
        (True, False): "gpt-2",  # ByteLevel itself cuts by GPT-2's regular expression
        (True, False, ("Digits", True)): "smollm",
        (False, True, ("Split", LLAMA3_SPLIT)): "llama-bpe",
        (False, False, ("Split", LLAMA3_SPLIT)): "smaug-bpe",
        (False, False, ("Split", QWEN2_SPLIT)): "qwen2",
    }.get((last.get("use_regex", True), bpe.get("ignore_merges", False), *cut))
    unknown = [bpe.get(key) for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")]
    unknown += [step.get("add_prefix_space") for step in [*cuts, last]]
    unknown += [token["lstrip"] or token["rstrip"] for token in tokenizer["added_tokens"]]
    unknown += [step.get("behavior", "Isolated") != "Isolated" for step in cuts]
    normalizer = (tokenizer["normalizer"] or {}).get("type", "NFC")  # llama.cpp leaves NFC out, as for Qwen
    if name is None or (bpe["type"], last["type"], normalizer) != ("BPE", "ByteLevel", "NFC") or any(unknown):
        raise UserError(f"a tokenizer of this kind is not written as GGUF, as its pre-tokenizer is unknown; {REMEDY}")
    return name


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    as_json = json.loads(tokenizer.backend_tokenizer.to_str())
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    if whole not in (plain, [tokenizer.bos_token_id, *plain]):
        raise UserError(f"a tokenizer that adds more than a begin-of-text token is not written as GGUF; {REMEDY}")
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    rows = range(model.get_input_embeddings().num_embeddings)  # there may be more of them than tokens
    types = dict.fromkeys(names, gguf.TokenType.NORMAL) | {
        number: gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        for number, token in tokenizer.added_tokens_decoder.items()
    }
    writer.add_tokenizer_model("gpt2")  # which stands for byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer_name(as_json))
    writer.add_token_list([names.get(row, f"[PAD{row}]") for row in rows])
    writer.add_token_types([types.get(row, gguf.TokenType.UNUSED) for row in rows])
    merges = as_json["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(whole != plain)
    for kind in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ends = model.generation_config.eos_token_id if model.generation_config else None
    for end in ends if isinstance(ends, list) else [ends]:
        if end not in (None, tokenizer.eos_token_id):  # an answer ends with another token than a text
            writer.add_eot_token_id(end)
            break
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates, by name
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _add_weights(writer: gguf.GGUFWriter, model: PreTrainedModel, kind: gguf.GGMLQuantizationType) -> None:
    config = model.config
    names = gguf.get_tensor_name_map(ARCHITECTURES[config.model_type], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embeddings
        weights = tensor.detach().float().cpu().numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads and config.model_type == "llama":
            # Rotary positions turn pairs of a head's rows. transformers pairs row i with i + n/2, llama.cpp 2i with
            # 2i + 1: so the rows of each head go in the order 0, n/2, 1, n/2 + 1, ...
            weights = weights.reshape(heads, 2, len(weights) // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)
        chosen = kind if weights.ndim == 2 else gguf.GGMLQuantizationType.F32
        if chosen == gguf.GGMLQuantizationType.Q8_0 and weights.shape[1] % 32:  # it has blocks of 32 numbers
            chosen = gguf.GGMLQuantizationType.F16
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(weights), chosen), raw_dtype=chosen)
