"""Write a model as one GGUF file, for llama.cpp, Ollama and LM Studio, or the model of a checkpoint as a folder.

    ./launch.sh export runs/sft-... --gguf my_model.gguf
    ./launch.sh export smollm2 --gguf smollm2.gguf --dtype q8_0
    ./launch.sh export runs/sft-...                       the newest checkpoint, as runs/sft-.../model-step-00000120
    ./launch.sh export runs/sft-... --checkpoint 80 --output my_model

A LoRA adapter is merged into its base. The GGUF file has the tokenizer and the chat template. Only Llama, Qwen2 and
Qwen3 models with byte-level BPE tokenizers are written; for others, llama.cpp's own convert_hf_to_gguf.py takes the
run's model/ (of a LoRA run, the folder that ./launch.sh merge writes).

Without --gguf, the folder is the one that the run would have exported after that step, also of a run that has died or
is still training. No rank, no GPU and no more memory than one file of 5 GB are needed.
"""

import os
from pathlib import Path

from lib.errors import UserError, display_path, from_home, run_command
from lib.launch import model_argument

DTYPES = ("f32", "f16", "bf16", "q8_0")


def main(arguments: list[str]) -> None:
    parser = model_argument.parser_of("export", __doc__)
    parser.add_argument("--gguf", metavar="FILE", help="the file to write")
    parser.add_argument("--checkpoint", type=int, metavar="STEP", help="of a run (default: its newest)")
    parser.add_argument("--output", metavar="FOLDER", help="for a checkpoint's model (default: in the run)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="f32",
        help="of the matrices (default: f32, exact; f16 and bf16 are half as large, q8_0 a quarter)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    options = model_argument.parse(parser, arguments)
    if options.gguf is None:
        with model_argument.quiet():
            from lib.run import checkpoint_model

            run = Path(from_home(options.model))
            output = Path(from_home(options.output)) if options.output else None
            step, output = checkpoint_model.write(run, options.checkpoint, output, options.overwrite)
        size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        print(f"{display_path(output)}: {options.model} after step {step}, {size / 1e6:,.0f} MB")
        return
    if options.checkpoint is not None or options.output is not None:
        raise UserError("--gguf takes the run's model/; leave --checkpoint and --output out, or --gguf")
    name, file = model_argument.find_model(options.model), Path(from_home(options.gguf))
    if file.is_dir():
        raise UserError(f"--gguf {display_path(file)} is a folder; name a file in it")
    if file.exists() and not options.overwrite:
        raise UserError(f"{display_path(file)} exists already; --overwrite replaces it")
    if not file.parent.is_dir():
        raise UserError(f"--gguf {file}: there is no folder {display_path(file.parent)}")
    with model_argument.quiet():
        from lib.models import adapters, gguf_file

        if Path(name).is_dir() and not model_argument.is_adapter(name):
            gguf_file.check(model_argument.check_folder(Path(name)))  # before the weights are read
        tokenizer = adapters.load_tokenizer(name, None, options.trust_remote_code)
        model = adapters.load_merged(name, None, options.trust_remote_code)
        unfinished = file.with_name(f".{file.name}-{os.getpid()}")
        try:
            gguf_file.write(model, tokenizer, unfinished, options.dtype, Path(options.model).name)
            unfinished.replace(file)  # whole or not at all
        except OSError as error:
            raise UserError(f"{display_path(file)} cannot be written ({error})") from None
        finally:
            unfinished.unlink(missing_ok=True)
    print(f"{display_path(file)}: {options.model} in {options.dtype}, {file.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    run_command(main)
