"""./launch.sh chat: as a user types, with a terminal and without; what is remembered, and what is refused."""

import json
import os
import pty
import re
import resource
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SCRIPTS, execute, launch
from small_models import (
    new_tokenizer,
    one_thread,  # noqa: F401  # for all of these tests
    refused,
    save_adapter_run,
    save_tiny,
    tiny,
)

from lib.launch.chat import Chat
from lib.models import smollm2
from lib.models.answers import Model

LONG_ANSWER = 800  # tokens of smollm2-tiny, some seconds


class Terminal:
    """./launch.sh chat, or another command, in a terminal of its own."""

    def __init__(self, *arguments: str, command: Sequence[str] = (str(ROOT / "launch.sh"), "chat")):
        self._screen, terminal = pty.openpty()
        self.process = subprocess.Popen(
            [*command, *arguments],
            preexec_fn=lambda: os.login_tty(terminal),
            env=os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}", "TERM": "dumb"},
            cwd=ROOT,
        )
        os.close(terminal)
        self.seen = ""

    def wait_for(self, words: str, seconds: float = 30) -> str:
        """What is on the screen since the last call, up to these words."""
        deadline = time.monotonic() + seconds
        while words not in self.seen:
            ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline - time.monotonic()))
            try:
                assert ready, f"{words!r} did not come: {self.seen!r}"
                self.seen += os.read(self._screen, 4096).decode(errors="replace")
            except OSError:  # it has ended
                pytest.fail(f"{words!r} did not come: {self.seen!r}")
        before, _, self.seen = self.seen.partition(words)
        return before + words

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def end(self) -> int:
        code = self.process.wait(timeout=20)
        os.close(self._screen)
        return code


def test_one_answer_is_all_on_stdout_and_comes_in_time() -> None:
    smollm2.folder("smollm2")  # converted once, before the clock runs
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = launch("chat", "smollm2", "--prompt", "What is the capital of France?", "--max_new_tokens", 30)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of a core, for the cores may be busy with other work. Most of them are imports.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 15
    assert done.returncode == 0 and done.stderr == ""
    assert "Paris" in done.stdout and len(done.stdout.splitlines()) == 1


def test_a_talk_in_a_terminal(tmp_path: Path) -> None:
    terminal = Terminal(save_tiny(tmp_path), "--max_new_tokens", str(LONG_ANSWER), "--temperature", "1")
    terminal.wait_for("> ")
    terminal.type("\n  \n")  # nothing to answer
    terminal.wait_for("> ")
    terminal.wait_for("> ")
    terminal.type("/reest\n")
    terminal.wait_for("there is no command /reest")
    terminal.wait_for("> ")
    terminal.type("x " * 1100 + "\n")  # the model reads 1024 tokens
    terminal.wait_for("too long")
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("hello")
    answer = ""
    for _ in range(5):  # it streams: a part of the answer is here long before its end
        answer += terminal.wait_for("e")
    terminal.type("\x03")
    answer += terminal.wait_for("(stopped)")
    assert 5 < len(answer) < 4 * LONG_ANSWER
    terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("forgotten")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_at_the_prompt_ends() -> None:
    read_all = "from lib.launch.chat import messages; print('read:', list(messages()))"
    terminal = Terminal(command=[str(SCRIPTS / "python"), "-c", read_all])
    terminal.wait_for("> ")
    terminal.type("hello\n")
    terminal.wait_for("> ")
    time.sleep(0.3)  # Python's input() misses a signal that comes while it turns to the terminal, faster than a hand
    terminal.type("\x03")
    terminal.wait_for("read: ['hello']")
    assert terminal.end() == 0


def test_a_base_model_goes_on_with_each_line_of_stdin(tmp_path: Path) -> None:
    save_tiny(tmp_path / "run" / "model", chats=False)
    done = subprocess.run(
        [ROOT / "launch.sh", "chat", tmp_path / "run", "--max_new_tokens", "4"],
        input=b"Once upon a\n\n\xff a time\n/exit\nnever\n", capture_output=True, timeout=60,
        env=os.environ | {"PATH": f"{SCRIPTS}:{os.environ['PATH']}"},
    )  # fmt: skip
    notes = done.stderr.decode()
    assert done.returncode == 0 and notes.count("no chat template") == 1 and "Traceback" not in notes
    assert done.stdout.decode().count("\n") >= 2
    model, tokenizer = tiny()
    first = Model(model, tokenizer).answer([tokenizer("Once upon a")["input_ids"]], 4, 0.0)[0]
    assert done.stdout.decode().startswith(f"{first}\n")


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(*tiny())


def test_a_talk_is_remembered(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    chat = Chat(model, "Be brief.", 8, 0.0)
    chat.answer("first")
    first = capsys.readouterr().out
    chat.answer("second")
    second = capsys.readouterr().out
    said = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": first[:-1]},
        {"role": "user", "content": "second"},
    ]
    assert second == model.answer([model.tokens_of(said)], 8, 0.0)[0] + "\n"
    alone = model.answer([model.tokens_of([said[0], said[-1]])], 8, 0.0)[0]
    assert second != alone + "\n"
    chat.turns = []
    chat.answer("second")
    assert capsys.readouterr().out == alone + "\n"


def test_the_oldest_turns_go_where_the_talk_gets_too_long(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert model.limit == 1024
    chat = Chat(model, "Be brief.", 24, 0.0)
    for number in range(3):
        chat.answer(f"{number} " + "word " * 400)
    notes = capsys.readouterr().err
    assert notes.count("oldest turn is gone") == 1 and len(notes.splitlines()) == 1
    assert [turn[0]["content"][0] for turn in chat.turns] == ["1", "2"]
    with refused("too long", "1,000 have room"):
        chat.answer("word " * 1100)
    assert len(chat.turns) == 2  # as they were
    start = model.tokenizer.decode(chat._tokens("x", chat.turns))[:70]
    assert start.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 word")
    with refused("--max_new_tokens is 1024"):
        Chat(model, None, 1024, 0.0)
    with refused("leaves no room"):
        Chat(model, "word " * 1100, 24, 0.0)


def test_an_answer_is_drawn_above_temperature_0(model: Model) -> None:
    prompt = model.tokens_of([{"role": "user", "content": "hello"}])
    assert len({model.answer([prompt], 12, 0.0)[0] for _ in range(3)}) == 1
    assert len({model.answer([prompt], 12, 1.0)[0] for _ in range(3)}) == 3


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Any]:
    """{what is wrong: a folder}"""
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "metrics.jsonl").touch()
    for name, files in {
        "no_weights": {"config.json": "{}"},
        "classifier": {"config.json": json.dumps({"architectures": ["BertForSequenceClassification"]})},
        "no_json": {"config.json": "{", "model.safetensors": ""},
        "no_weights_of_the_adapter": {"adapter_config.json": json.dumps({"base_model_name_or_path": "smollm2-tiny"})},
    }.items():
        (tmp_path / name / "model").mkdir(parents=True)
        for file, content in files.items():
            (tmp_path / name / "model" / file).write_text(content)
    yield tmp_path


MISTAKES = [
    (["{}/nowhere"], ["nowhere", "no folder"]),
    (["lib/nowhere"], ["lib/nowhere", "no folder"]),
    (["smolm2"], ["did you mean 'smollm2'"]),
    (["{}/empty"], ["neither a run nor a model"]),
    (["{}/unfinished"], ["no model/ yet"]),
    (["{}/no_weights"], ["no weights"]),
    (["{}/classifier"], ["BertForSequenceClassification", "no language model"]),
    (["{}/no_json"], ["config.json", "damaged"]),
    (["{}/no_weights_of_the_adapter"], ["no weights"]),
    (["launch.sh"], ["is a file"]),
    (["smollm2", "--promt", "x"], ["--promt", "did you mean '--prompt'"]),
    (["smollm2", "--prompt", " "], ["--prompt is empty"]),
    (["smollm2", "--temperature", "-1"], ["--temperature is -1"]),
    (["smollm2", "--max_new_tokens", "0"], ["--max_new_tokens is 0"]),
    (["smollm2", "--max_new_tokens", "x"], ["--max_new_tokens", "'x'"]),
    (["smollm2", "--adapter", "lib"], ["lib", "neither a run"]),
    (["smollm2", "--adapter", "smollm2"], ["no folder with an adapter"]),
    ([], ["model"]),
]


def test_a_mistake_is_one_line_and_said_at_once(damaged: Path) -> None:
    for arguments, words in MISTAKES:
        started = time.monotonic()
        command = [argument.replace("{}", str(damaged)) for argument in arguments]
        done = execute([SCRIPTS / "python", "-P", "-m", "lib.launch.chat", *command])
        assert time.monotonic() - started < 3, command  # torch is not imported
        assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, (command, done.stderr)
        for word in words:
            assert word in done.stderr, command


def test_the_commands_are_known_to_launch_sh() -> None:
    usage = launch("--help").stdout
    for command in ("chat", "generate", "merge", "export"):
        assert re.search(rf"launch.sh {command} ", usage)
        done = launch(command, "--help")
        assert done.returncode == 0 and f"./launch.sh {command}" in done.stdout and not done.stderr
    assert "did you mean 'chat'" in launch("chatt").stderr


def test_a_model_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """Where the file of the weights is cut off, which is seen when it is read."""
    save_adapter_run(tmp_path / "run", "smollm2-tiny")
    weights = tmp_path / "run" / "model" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with refused("adapter", "cannot be read"):
        Model.load(str(tmp_path / "run" / "model"), None, "cpu", "fp32", False)
    model, _ = tiny()
    model.save_pretrained(tmp_path / "alone")
    with refused("tokenizer"):
        Model.load(str(tmp_path / "alone"), None, "cpu", "fp32", False)
    new_tokenizer().save_pretrained(tmp_path / "alone")
    assert Model.load(str(tmp_path / "alone"), None, "cpu", "fp32", False).ends == {0, 2}
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
