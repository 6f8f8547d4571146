"""./launch.sh generate: one answer a row, whatever the batch; interrupted and gone on with; what is refused."""

import csv
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, SCRIPTS
from small_models import call, one_thread, refused, save_tiny  # noqa: F401  # one_thread: for all these tests

from lib.launch import generate

WORDS = [
    "a short one",
    "what is the capital of France, and of Spain, and of Italy?",
    "é 漢字",
    "12 and 34",
    "list three",
    "why?",
]
ROWS: list[dict[str, Any]] = [{"id": number, "prompt": f"{WORDS[number % 6]} {number}"} for number in range(11)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("model"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_answer_does_not_depend_on_the_batch(model: str, tmp_path: Path) -> None:
    questions = write_rows(tmp_path / "questions.jsonl", ROWS)
    answers = {}
    for batch_size in (1, 4):
        output = tmp_path / f"{batch_size}.jsonl"
        common = ["--input", questions, "--output", output, "--max_new_tokens", 12]
        assert "11 answers" in call(generate.main, model, *common, "--batch_size", batch_size)
        answers[batch_size] = read_rows(output)
    assert answers[1] == answers[4]
    assert [{key: row[key] for key in ("id", "prompt")} for row in answers[1]] == ROWS
    assert len({row["answer"] for row in answers[1]}) > 5  # the model says different things
    assert not any("<|im_end|>" in row["answer"] for row in answers[1])


def test_csv_parquet_and_messages_have_the_same_answers(model: str, tmp_path: Path) -> None:
    rows = ROWS[:3]
    with (tmp_path / "rows.csv").open("w") as file:
        writer = csv.DictWriter(file, ["id", "question"])
        writer.writeheader()
        writer.writerows({"id": row["id"], "question": row["prompt"]} for row in rows)
    messages = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(messages), tmp_path / "rows.parquet")
    found = []
    for name, column in (("rows.csv", "question"), ("rows.parquet", "prompt")):
        output = tmp_path / f"{name}.jsonl"
        common = ["--input", tmp_path / name, "--output", output, "--max_new_tokens", 5]
        call(generate.main, model, *common, "--prompt_column", column)
        found.append(read_rows(output))
    assert [row["answer"] for row in found[0]] == [row["answer"] for row in found[1]]
    assert [set(row) for row in found[0] + found[1]] == [{"id", "question", "answer"}] * 3 + [
        {"id", "prompt", "answer"}
    ] * 3
    assert [row["id"] for row in found[1]] == [0, 1, 2]


def test_it_goes_on_with_what_is_there_and_refuses_what_is_not_its_own(model: str, tmp_path: Path) -> None:
    questions, output = write_rows(tmp_path / "questions.jsonl", ROWS), tmp_path / "answers.jsonl"

    def run(*more: Any, input: Path = questions) -> str:
        return call(generate.main, model, "--input", input, "--output", output, "--max_new_tokens", 6, *more)

    run("--batch_size", 3)
    whole = output.read_bytes()
    lines = whole.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:4]) + lines[4][:9])  # the fifth line is cut off
    run()
    assert output.read_bytes() == whole
    output.write_bytes(whole[:-1])  # all is there but the end of the last line
    run()
    assert output.read_bytes() == whole
    started = time.monotonic()
    assert "were there already" in run() and output.read_bytes() == whole
    assert time.monotonic() - started < 2  # without loading the model
    with refused("max_new_tokens 6", "now it is 7"):
        run("--max_new_tokens", 7)
    with refused(f"model {model}", "now it is smollm2-tiny"):
        call(generate.main, "smollm2-tiny", "--input", questions, "--output", output, "--max_new_tokens", 6)
    other = write_rows(tmp_path / "other.jsonl", [*ROWS[:5], ROWS[5] | {"prompt": "other"}, *ROWS[6:]])
    with refused("line 6", "not the row"):
        run(input=other)
    with refused("11 rows", "the input 2"):
        run(input=write_rows(tmp_path / "two.jsonl", ROWS[:2]))
    output.write_bytes(lines[0] + b"{}\n" + lines[2])
    with refused("line 2", "not written by this command"):
        run()
    os.utime(Path(model) / "model.safetensors", (1, 1))  # as if it were trained anew
    output.write_bytes(whole)
    with refused("weights_date"):
        run()
    (tmp_path / "answers.jsonl.settings.json").unlink()
    with refused("without the answers.jsonl.settings.json"):
        run()
    assert output.read_bytes() == whole


def test_ctrl_c_leaves_whole_lines(model: str, tmp_path: Path) -> None:
    questions = write_rows(tmp_path / "questions.jsonl", [{"prompt": f"row {number}"} for number in range(400)])
    output = tmp_path / "answers.jsonl"
    command = [str(ROOT / "launch.sh"), "generate", model, "--input", str(questions), "--output", str(output)]
    process = subprocess.Popen(
        [*command, "--batch_size", "2", "--max_new_tokens", "50"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out == "" and "Traceback" not in err
    written = read_rows(output)
    assert output.read_text().endswith("\n") and 0 < len(written) < 400 and len(written) % 2 == 0
    assert f"stopped: {len(written)} of 400 rows" in err


def test_a_mistake_is_found_before_the_model_is_loaded(model: str, tmp_path: Path) -> None:
    def run(rows: list[Any], *more: Any) -> None:
        questions = write_rows(tmp_path / "rows.jsonl", rows)
        started = time.monotonic()
        try:
            call(generate.main, model, "--input", questions, "--output", tmp_path / "out.jsonl", *more)
        finally:
            assert time.monotonic() - started < 2 and not (tmp_path / "out.jsonl").exists()

    with refused("no column 'promt'", "did you mean 'prompt'"):
        run(ROWS, "--prompt_column", "promt")
    with refused("column 'answer' already"):
        run([ROWS[0] | {"answer": "x"}])
    with refused("line 2", "must be a text"):
        run([ROWS[0], {"id": 1, "prompt": 7}])
    with refused("line 1", "must be a text"):
        run([{"prompt": [{"content": "no role"}]}])
    with refused("line 2", "not an object"):
        run([ROWS[0], 3])
    with refused("--batch_size is 0"):
        run(ROWS, "--batch_size", 0)
    with refused("the file is empty"):
        run([])
    with refused("unknown argument '--batchsize'", "--batch_size"):
        run(ROWS, "--batchsize", 3)
    with refused("no such file"):
        call(generate.main, model, "--input", tmp_path / "no.jsonl", "--output", tmp_path / "out.jsonl")
    with refused("--input"):
        call(generate.main, model, "--output", tmp_path / "out.jsonl")


def test_a_prompt_that_the_model_cannot_read_is_named(model: str, tmp_path: Path) -> None:
    long = write_rows(tmp_path / "rows.jsonl", [ROWS[0], {"prompt": "word " * 1100}])
    with refused("line 2", "more than the 1,024 of the model"):
        call(generate.main, model, "--input", long, "--output", tmp_path / "out.jsonl")
    base = save_tiny(tmp_path / "base", chats=False)
    messages = write_rows(tmp_path / "rows.jsonl", [{"prompt": [{"role": "user", "content": "x"}]}])
    with refused("line 1", "no chat template"):
        call(generate.main, base, "--input", messages, "--output", tmp_path / "out.jsonl")
