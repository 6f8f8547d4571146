"""Talk to a model in the terminal.

    ./launch.sh chat runs/sft-...                             the model that a run has trained
    ./launch.sh chat smollm2                                  SmolLM2-135M-Instruct, from a package
    ./launch.sh chat smollm2 --adapter runs/sft-...           with a LoRA adapter
    ./launch.sh chat smollm2 --prompt "What is a tensor?"     one answer on stdout, for scripts

The model sees what was said before; /reset clears that, /exit or Ctrl-D ends, /help lists the commands. Ctrl-C stops an
answer. Where the talk gets longer than the model can read, its oldest turns go. Without a terminal, each line of stdin
is a message. A model without a chat template goes on with each text as it is.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from lib.errors import INTERRUPTED, UserError, run_command
from lib.launch import model_argument

HELP = "/reset clears what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer"


def note(text: str) -> None:
    """A line for the user, which is no answer."""
    print(f"({text})", file=sys.stderr, flush=True)


def say(text: str) -> None:
    print(text, end="", flush=True)


class Chat:
    """What was said so far, and the model that goes on with it."""

    def __init__(self, model: Any, system: str | None, max_new_tokens: int, temperature: float):
        self.model, self.temperature = model, temperature
        limit = model.limit or sys.maxsize
        if max_new_tokens >= limit:
            raise UserError(
                f"--max_new_tokens is {max_new_tokens}, but the model reads and writes {limit:,} tokens in all"
            )
        self.max_new_tokens, self.room = max_new_tokens, limit - max_new_tokens  # for the prompt
        if system is not None and not model.chats:
            raise UserError("--system: this model has no chat template, and so no system messages")
        self.system = [] if system is None else [{"role": "system", "content": system}]
        self.turns: list[list[dict[str, str]]] = []  # each a message and its answer
        if model.chats and len(self._tokens("")) > self.room:
            raise UserError(
                f"--system with --max_new_tokens {max_new_tokens} leaves no room for a message: the model reads and "
                f"writes {limit:,} tokens in all"
            )

    def _tokens(self, message: str, turns: list[list[dict[str, str]]] | None = None) -> list[int]:
        if not self.model.chats:
            return list(self.model.tokens_of(message))
        before = [said for turn in turns or [] for said in turn]
        return list(self.model.tokens_of([*self.system, *before, {"role": "user", "content": message}]))

    def answer(self, message: str) -> bool:
        """Print the answer to a message. False where Ctrl-C stopped it. Raises UserError where it is too long."""
        from lib.models.answers import Stream, interruptible

        alone = self._tokens(message)
        if not alone:
            raise UserError("there are no tokens in this text")
        if len(alone) > self.room:
            raise UserError(f"this message is too long: {len(alone):,} tokens, where {self.room:,} have room; not sent")
        kept = self.turns
        while kept and len(self._tokens(message, kept)) > self.room:
            kept = kept[1:]
        if len(kept) < len(self.turns):
            gone = len(self.turns) - len(kept)
            which = "turn is" if gone == 1 else f"{gone} turns are"
            note(f"the talk is longer than the model can read: the oldest {which} gone")
        self.turns = kept
        stream = Stream(self.model, say)
        with interruptible() as stopped:
            self.model.answer([self._tokens(message, kept)], self.max_new_tokens, self.temperature, stream, stopped)
        say("\n")
        if self.model.chats and stream.text:
            user, assistant = {"role": "user", "content": message}, {"role": "assistant", "content": stream.text}
            self.turns = [*kept, [user, assistant]]
        return not stopped()


def messages() -> Iterator[str]:
    """What the user types, a line at a time, or the lines of stdin. Ends with Ctrl-D, with Ctrl-C, and with /exit."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # lets input() edit a line and find earlier ones
    while True:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print(file=sys.stderr)
            return
        line = line.encode("utf-8", "replace").decode().strip()  # bytes that are no UTF-8 become question marks
        if line == "/exit":
            return
        if line:
            yield line


def talk(chat: Chat) -> None:
    for message in messages():
        if message == "/reset":
            chat.turns = []
            note("what was said is forgotten")
        elif message == "/help":
            note(HELP)
        elif message.startswith("/") and " " not in message and "/" not in message[1:]:
            note(f"there is no command {message}; {HELP}")
        else:
            try:
                if not chat.answer(message):
                    note("stopped")
            except UserError as error:
                note(str(error))


def main(arguments: list[str]) -> None:
    parser = model_argument.parser_of("chat", __doc__)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this alone, on stdout")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told first")
    model_argument.add_answer_options(parser, 512)
    options = model_argument.parse(parser, arguments)
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("--prompt is empty")
    name, adapter = model_argument.find_model(options.model), model_argument.find_adapter(options.adapter)
    started, device = time.monotonic(), model_argument.device()
    with model_argument.quiet():
        import torch

        from lib.models.answers import Model

        model = Model.load(name, adapter, device, options.precision, options.trust_remote_code)
        torch.manual_seed(options.seed)
    chat = Chat(model, options.system, options.max_new_tokens, options.temperature)
    if not model.chats:
        note(f"{options.model} has no chat template: it goes on with each text as it is, and remembers none")
    if options.prompt is not None:
        if not chat.answer(options.prompt):
            sys.exit(INTERRUPTED)
        return
    note(f"{options.model} on {device}, loaded in {time.monotonic() - started:.0f} s; {HELP}")
    talk(chat)


if __name__ == "__main__":
    run_command(main)
