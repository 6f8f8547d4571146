"""Put the LoRA adapter that a run has trained into its base model, and write both as one model.

    ./launch.sh merge runs/sft-...                         writes runs/sft-.../merged
    ./launch.sh merge runs/sft-... --output my_model

The result is in fp32 (safetensors), with the tokenizer; from_pretrained loads it, without peft.
"""

import os
import shutil
from pathlib import Path

from lib.errors import UserError, display_path, from_home, run_command
from lib.launch import model_argument


def check_output(folder: Path, overwrite: bool, source: Path) -> None:
    """Raise a UserError where the merged model cannot be written to this folder."""
    if source.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--output {folder}: the adapter lies there; choose another folder")
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"{display_path(folder)} exists already; --overwrite replaces it")
    if not (folder / "config.json").is_file():
        raise UserError(f"{display_path(folder)} is no model folder, and is not deleted; choose another --output")


def main(arguments: list[str]) -> None:
    parser = model_argument.parser_of("merge", __doc__)
    parser.add_argument("--output", metavar="FOLDER", help="where to (default: merged/ in the run)")
    parser.add_argument("--overwrite", action="store_true", help="replace a merged model that is there")
    options = model_argument.parse(parser, arguments)
    name = model_argument.find_model(options.model)
    if not model_argument.is_adapter(name):
        raise UserError(f"{display_path(name)} is a whole model already: there is no adapter to merge")
    run = Path(from_home(options.model))
    output = Path(from_home(options.output)) if options.output else run / "merged"
    check_output(output, options.overwrite, Path(name))
    with model_argument.quiet():
        from lib.models import adapters, hub

        tokenizer = adapters.load_tokenizer(name, None, options.trust_remote_code)
        model = adapters.load_merged(name, None, options.trust_remote_code)
        unfinished = output.with_name(f".{output.name}-{os.getpid()}")
        try:
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            if output.exists():
                shutil.rmtree(output)
            unfinished.rename(output)  # whole or not at all
        except OSError as error:
            raise UserError(f"{display_path(output)} cannot be written ({error})") from None
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    base = hub.base_of(name)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{display_path(output)}: {base} with the adapter of {display_path(name)}, {size / 1e6:,.0f} MB")


if __name__ == "__main__":
    run_command(main)
