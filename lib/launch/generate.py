"""Answer every row of a file.

    ./launch.sh generate runs/sft-... --input questions.jsonl --output answers.jsonl
    ./launch.sh generate smollm2 --input table.csv --prompt_column question --output answers.jsonl --batch_size 16

The input is a JSON lines, CSV or Parquet file. A row's prompt is a text, which the model's chat template makes a
message, or a list of messages as {"role": ..., "content": ...}. The output has one JSON line a row, in the order of the
input: its columns and "answer". At temperature 0 an answer does not depend on the rows beside it.

The same command goes on with an output that was interrupted. Beside the output lies <output>.settings.json: with other
settings, or another input, the command refuses to go on.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Any

from lib.errors import INTERRUPTED, UserError, did_you_mean, display_path, from_home, run_command
from lib.launch import model_argument
from lib.progress import progress
from lib.run.signs import Signs

Row = tuple[str, dict[str, Any]]  # (its place in the file, such as "line 3", its columns)


def read_rows(file: str, prompt_column: str, answer_column: str) -> list[Row]:
    """All rows of the input with all their columns. Raises UserError for a row without a prompt."""
    from lib.data.sources import find_sources, short  # takes a second

    if not Path(from_home(file)).is_file():
        raise UserError(f"--input {file}: no such file (looked from {Path.cwd()})")
    path = from_home(file)
    (source,) = find_sources(path, [prompt_column])[0]["train"]
    _, first = next(source.read(), ("", None))
    if first is None:
        raise UserError(f"--input {file}: no rows")
    columns = list(first) if isinstance(first, dict) else []
    if prompt_column not in columns:
        near = did_you_mean(prompt_column, columns)
        raise UserError(
            f"--input {file} has no column '{prompt_column}'{near}; it has {', '.join(columns) or 'no columns'}; "
            "choose one with --prompt_column"
        )
    if answer_column in columns:
        raise UserError(
            f"--input {file} has a column '{answer_column}' already; give the answers another --answer_column"
        )
    (source,) = find_sources(path, columns)[0]["train"]  # of Parquet, only the columns that are named are read
    rows = []
    for place, row in source.read():
        where = f"{display_path(path)}, {place}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: not an object with columns, but {short(row)}")
        prompt = row.get(prompt_column)
        if not (isinstance(prompt, str) and prompt.strip()) and not are_messages(prompt):
            raise UserError(
                f"{where}: '{prompt_column}' is {short(prompt)}; "
                'it must be a text, or a list of messages as {"role": "user", "content": "..."}'
            )
        rows.append((where, row))
    return rows


def are_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in prompt)
        and all(isinstance(message.get("role"), str) for message in prompt)
    )


def line_of(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str)  # a date, say, becomes text


class Output:
    """The file of answers, which is written a batch at a time, and the settings that they were made with."""

    def __init__(self, file: str, settings: dict[str, Any], answer_column: str):
        self.path = Path(from_home(file))
        self.settings_path = Path(f"{self.path}.settings.json")
        self._settings, self._answer_column = settings, answer_column

    def done(self, rows: list[Row]) -> int:
        """How many rows have their answer. A last line that was cut off is taken away.

        Raises UserError where the answers are those of other rows, or were made with other settings.
        """
        if not self.path.exists():
            return 0
        remedy = "delete it, or choose another --output"
        name = display_path(self.path)
        try:
            before = json.loads(self.settings_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{name} exists, without the {self.settings_path.name} of this command; {remedy}") from None
        for key, now in self._settings.items():
            if before.get(key) != now:
                raise UserError(f"{name} was made with {key} {before.get(key)}, and now it is {now}; {remedy}")
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if len(lines) > len(rows):
            raise UserError(f"{name} has {len(lines):,} rows, the input {len(rows):,}; {remedy}")
        for number, (line, (where, row)) in enumerate(zip(lines, rows, strict=False), 1):
            try:
                written = json.loads(line)
                written.pop(self._answer_column)
            except (ValueError, AttributeError, KeyError):
                raise UserError(f"{name}, line {number}: not written by this command; {remedy}") from None
            if line_of(written) != line_of(row):
                raise UserError(f"{name}, line {number}: not the row of {where}; {remedy}")
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        return len(lines)

    def open(self) -> IO[bytes]:
        """The file, to add lines at its end. Raises UserError where it cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.settings_path.write_text(json.dumps(self._settings, indent=2) + "\n", encoding="utf-8")
            return self.path.open("ab", buffering=0)  # so that lines get there whole, also where Ctrl-C follows
        except OSError as error:
            raise UserError(f"--output {self.path} cannot be written ({error})") from None


def tokens_of(model: Any, rows: list[Row], prompt_column: str, max_new_tokens: int) -> list[list[int]]:
    """The tokens of each row's prompt. Raises UserError for the first row that the model cannot read."""
    found = []
    for where, row in rows:
        prompt = row[prompt_column]
        if model.chats and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if not model.chats and not isinstance(prompt, str):
            raise UserError(f"{where}: the prompt is messages, but the model has no chat template; give texts")
        try:
            tokens = model.tokens_of(prompt)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if model.limit and len(tokens) + max_new_tokens > model.limit:
            raise UserError(
                f"{where}: {len(tokens):,} tokens with --max_new_tokens {max_new_tokens} are more than the "
                f"{model.limit:,} of the model; shorten the prompt"
            )
        found.append(tokens)
    return found


def weights_date(name: str) -> float | None:
    """When the weights in a folder were last written: a run that is trained anew has the same name."""
    times = [file.stat().st_mtime for file in Path(name).glob("*.safetensors")]
    return max(times, default=None)


def main(arguments: list[str]) -> None:
    parser = model_argument.parser_of("generate", __doc__)
    parser.add_argument("--input", required=True, metavar="FILE", help="a .jsonl, .csv or .parquet file")
    parser.add_argument("--output", required=True, metavar="FILE", help="the .jsonl file to write, or to go on with")
    parser.add_argument("--prompt_column", default="prompt", metavar="NAME", help="(default: prompt)")
    parser.add_argument("--answer_column", default="answer", metavar="NAME", help="in the output (default: answer)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="rows at once (default: 8)")
    model_argument.add_answer_options(parser, 256)
    options = model_argument.parse(parser, arguments)
    if options.batch_size < 1:
        raise UserError(f"--batch_size is {options.batch_size}; set 1 or more")
    name, adapter = model_argument.find_model(options.model), model_argument.find_adapter(options.adapter)
    rows = read_rows(options.input, options.prompt_column, options.answer_column)
    settings = {key: getattr(options, key) for key in ("prompt_column", "max_new_tokens", "temperature", "precision")}
    settings |= {"model": name, "adapter": adapter}
    settings |= {"weights_date": weights_date(name), "adapter_date": weights_date(adapter) if adapter else None}
    if options.temperature:  # then tokens are drawn anew for each batch
        settings |= {"seed": options.seed, "batch_size": options.batch_size}
    output = Output(options.output, settings, options.answer_column)
    done = output.done(rows)
    if done < len(rows):
        started = time.monotonic()
        write_answers(options, name, adapter, rows, done, output)
        took = f", {time.monotonic() - started:.0f} s"
    else:
        took = " were there already"
    print(f"{display_path(output.path)}: {len(rows):,} answers{took}")


def write_answers(options: Any, name: str, adapter: str | None, rows: list[Row], done: int, output: Output) -> None:
    """Answer the rows behind the first `done`, and write them."""
    device = model_argument.device()
    with model_argument.quiet():
        import torch

        from lib.models.answers import Model

        model = Model.load(name, adapter, device, options.precision, options.trust_remote_code)
    tokens = tokens_of(model, rows[done:], options.prompt_column, options.max_new_tokens)
    if done:
        print(f"{display_path(output.path)} has {done:,} of {len(rows):,} rows; going on", file=sys.stderr)
    with output.open() as file, Signs(sys.stderr), progress("generating", len(rows)) as advance:
        advance(done)
        try:
            for first in range(done, len(rows), options.batch_size):
                batch = rows[first : first + options.batch_size]
                torch.manual_seed(options.seed + first)
                answers = model.answer(
                    tokens[first - done :][: len(batch)], options.max_new_tokens, options.temperature
                )
                lines = [
                    line_of(row | {options.answer_column: answer}) + "\n"
                    for (_, row), answer in zip(batch, answers, strict=True)
                ]
                file.write("".join(lines).encode("utf-8", "replace"))
                advance(len(batch))
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):
                written = output.path.read_bytes().count(b"\n")
                print(
                    f"stopped: {written:,} of {len(rows):,} rows are in {display_path(output.path)};"
                    " the same command goes on",
                    file=sys.stderr,
                )
            sys.exit(INTERRUPTED)
        except OSError as error:
            raise UserError(f"--output {output.path} cannot be written ({error})") from None


if __name__ == "__main__":
    run_command(main)
