"""A language model that is asked: prompts from chat templates, and answers, one by one as a stream or in batches."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lib.data.conversations import Message, render
from lib.models import adapters, hub

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Model:
    """A language model with its tokenizer, on a device."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model.eval(), tokenizer
        tokenizer.padding_side = "left"  # so that all rows of a batch end where their answers begin
        self.limit = hub.longest_text(model.config)  # tokens of prompt and answer together; None: no limit
        ends = model.generation_config.eos_token_id if model.generation_config else None
        self.ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}

    @classmethod
    def load(cls, name: str, adapter: str | None, device: str, precision: str, trust_remote_code: bool) -> "Model":
        """Raises UserError where the model, the adapter or the tokenizer cannot be read, or do not fit each other."""
        tokenizer = adapters.load_tokenizer(name, adapter, trust_remote_code)
        model = adapters.load_merged(name, adapter, trust_remote_code)
        hub.check_tokens(f"model {adapter or name}: it", model.config, tokenizer)
        return cls(model.to(device=torch.device(device), dtype=DTYPES[precision]), tokenizer)

    @property
    def chats(self) -> bool:
        """Whether there is a chat template. Otherwise this is a base model, which goes on with a text."""
        return self.tokenizer.chat_template is not None

    def tokens_of(self, prompt: str | Sequence[Message]) -> list[int]:
        """The tokens of a text, or of messages up to where the answer begins.

        Raises UserError where the chat template does not take these messages.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        text = render(self.tokenizer, prompt, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def answer(
        self, prompts: Sequence[list[int]], max_new_tokens: int, temperature: float, streamer: Any = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> list[str]:  # fmt: skip
        """The model's text after each prompt.

        temperature: 0 takes the most probable token, and then an answer does not depend on the other prompts.
        streamer: gets the tokens as they come. stopping: asked after each token whether to stop.
        """
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.model.device)
        how: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        # The model's own config may hold other ways to choose a token, such as a repetition penalty.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.tokenizer.pad_token_id, **how,
        )  # fmt: skip
        with torch.no_grad():
            tokens = self.model.generate(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], streamer=streamer,
                stopping_criteria=[lambda ids, scores: torch.full((len(ids),), stopping(), device=ids.device)],
            )  # fmt: skip
        return [self.text_of(row) for row in tokens[:, batch["input_ids"].shape[1] :].tolist()]

    def text_of(self, tokens: list[int]) -> str:
        """The text of an answer's tokens, up to the one that ends it."""
        end = next((place for place, token in enumerate(tokens) if token in self.ends), len(tokens))
        return str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))


class Stream:
    """Passes an answer's text on as its tokens come; transformers' generate calls `put` and `end`."""

    def __init__(self, model: Model, write: Callable[[str], None]):
        self._model, self._write = model, write
        self._tokens: list[int] | None = None  # None: the prompt comes first
        self.text = ""

    def put(self, tokens: torch.Tensor) -> None:
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens += tokens.flatten().tolist()
        text = self._model.text_of(self._tokens)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character whose other bytes are still to come
            self._pass_on(text)

    def end(self) -> None:
        self._pass_on(self._model.text_of(self._tokens or []))

    def _pass_on(self, text: str) -> None:
        self._write(text[len(self.text) :])
        self.text = text


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C ends the answer that is being made, between two tokens, and not the process. A second one does that.

    Gives a function that says whether Ctrl-C was pressed.
    """
    pressed: list[int] = []

    def note(number: int, frame: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
