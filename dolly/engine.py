"""The answers of a model, token by token: an own loop that can be watched, stopped at every token, and shared.

It gives the ids that `generate` gives, but for `no_repeat_ngram_size` (see `dolly.loops`). The streamed text grows by
whole characters.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers.decoders import DecodeStream
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dolly.errors import UserError
from dolly.loops import NoRepeatInAnswer
from dolly.prompt import Message, encode

ROOM = 4  # at least 1/4 of the window stays free for the answer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; top_p 1, top_k 0, penalty 1 and n-gram size 0 change nothing.

    Raises `UserError` for a value of another type or outside its range, where the scores would overflow.
    """

    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    seed: int | None = None  # None: another answer each time

    def __post_init__(self):
        for name, kind, holds, range_ in (
            ("max_new_tokens", int, lambda value: value >= 1, "a whole number, 1 or more"),
            ("temperature", int | float, lambda value: value == 0 or 0.01 <= value <= 100, "0, or from 0.01 to 100"),
            ("top_p", int | float, lambda value: 0 < value <= 1, "above 0 and at most 1"),
            ("top_k", int, lambda value: value >= 0, "a whole number, 0 or more"),
            ("repetition_penalty", int | float, lambda value: 0.01 <= value <= 100, "from 0.01 to 100"),
            ("no_repeat_ngram_size", int, lambda value: value >= 0, "a whole number, 0 or more"),
            ("seed", int | None, lambda value: value is None or abs(value) < 2**63, "a whole number below 2^63"),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind) or not holds(value):
                raise UserError(f"{name} must be {range_}, and is {value!r:.80}.")

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sampling":
        """What the model's generation_config asks for; where it is silent, the defaults of `generate`."""
        config = model.generation_config

        def given(name, otherwise):
            value = getattr(config, name)
            return otherwise if value is None else value

        return cls(
            max_new_tokens=given("max_new_tokens", 256),
            temperature=given("temperature", 1.0) if config.do_sample else 0.0,
            top_p=given("top_p", 1.0),
            top_k=given("top_k", 50),
            repetition_penalty=given("repetition_penalty", 1.0),
            no_repeat_ngram_size=given("no_repeat_ngram_size", 0),
        )

    def processors(self, start: int) -> LogitsProcessorList:
        """The processors of transformers that do this, in the order of `generate`, and ours against loops; start: the
        token at which the answer begins."""
        chain = LogitsProcessorList()
        if self.repetition_penalty != 1:
            chain.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size:
            chain.append(NoRepeatInAnswer(self.no_repeat_ngram_size, start))
        if self.temperature:
            if self.temperature != 1:
                chain.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                chain.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                chain.append(TopPLogitsWarper(self.top_p))
        return chain


@dataclass(frozen=True)
class Reply:
    """An answer so far. `ended` is None until its last token: an end token, max_new_tokens, or the window is full."""

    text: str
    tokens: int
    seconds: float
    dropped: int  # earlier turns that did not fit in the window
    ended: Literal["end", "limit", "window"] | None


class Engine:
    """A model that answers many conversations at once: their steps take turns, one token each."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast):
        self.model, self.tokenizer = model, tokenizer
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.window: int = min(positions or tokenizer.model_max_length, tokenizer.model_max_length)  # as it was trained
        ends = model.generation_config.eos_token_id
        self.ends = {ends} if isinstance(ends, int) else set(ends or ())
        self._turn = threading.Lock()
        if model.device.type == "cpu":
            token = torch.tensor([[tokenizer.eos_token_id]])  # never the padding, which transformers would warn of
            torch.set_num_threads(fastest_threads(lambda: model(token), torch.get_num_threads()))

    def stream(self, messages: list[Message], sampling: Sampling) -> Iterator[Reply]:
        """The answer to the last message, as it grows; each `Reply` holds the text from its beginning.

        Closing the iterator ends the work. Raises `UserError` when the last message alone is too long.
        """
        started = time.perf_counter()
        prompt, dropped = self.fit(messages, sampling.max_new_tokens)
        decoder = DecodeStream(skip_special_tokens=True)
        text = ""
        for count, token in enumerate(self.tokens(prompt, sampling), 1):
            text += decoder.step(self.tokenizer.backend_tokenizer, token) or ""
            if token in self.ends:
                ended = "end"
            elif count == sampling.max_new_tokens:
                ended = "limit"
            else:
                ended = "window" if len(prompt) + count == self.window else None
            yield Reply(text, count, time.perf_counter() - started, dropped, ended)

    def tokens(self, prompt: list[int], sampling: Sampling) -> Iterator[int]:
        """New ids until an end token, which is given too, max_new_tokens of them, or a full window."""
        device = self.model.device
        longest = min(len(prompt) + sampling.max_new_tokens, self.window)
        ids = torch.empty(1, longest, dtype=torch.long, device=device)
        ids[0, : len(prompt)] = torch.tensor(prompt)
        processors = sampling.processors(len(prompt))
        random = torch.Generator(device)
        random.seed() if sampling.seed is None else random.manual_seed(sampling.seed)

        read, cache = 0, None
        for known in range(len(prompt), longest):
            with self._turn, torch.inference_mode(), enough_memory():
                output = self.model(ids[:, read:known], past_key_values=cache, use_cache=True, logits_to_keep=1)
                scores = processors(ids[:, :known], output.logits[:, -1].float())
                if sampling.temperature:
                    token = torch.multinomial(scores.softmax(-1), 1, generator=random).item()
                else:
                    token = scores.argmax(-1).item()
            ids[0, known] = token
            read, cache = known, output.past_key_values
            yield token
            if token in self.ends:
                return

    def fit(self, messages: list[Message], max_new_tokens: int) -> tuple[list[int], int]:
        """The prompt's ids, and the number of earlier turns left out, oldest first, to leave room for the answer.

        A system turn stays. Raises `UserError` when the last message does not fit even alone.
        """
        most = self.window - min(max_new_tokens, self.window // ROOM)
        system, turns = messages[: messages[0]["role"] == "system"], messages[messages[0]["role"] == "system" :]
        for dropped in range(0, len(turns), 2):
            ids, _ = encode(self.tokenizer, system + turns[dropped:])
            if len(ids) <= most:
                return ids, dropped
        raise UserError(
            f"This is {len(ids) - most:,} tokens too long: the model reads {self.window:,} tokens at once, "
            f"{self.window - most:,} of them for its answer. Shorten the message."
        )


@contextlib.contextmanager
def enough_memory() -> Iterator[None]:
    """Raises `UserError` where the GPU has no memory left."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError("The GPU has no memory left for this conversation. Shorten it, or start a new one.") from None


def fastest_threads(step: Callable[[], object], most: int) -> int:
    """How many threads run `step` fastest, `most` halved as long as that costs little.

    Threads that wait for each other spin: beside another job, two on two cores were 5 times slower than one.
    """

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        step()
        steps, started = 0, time.perf_counter()
        while steps < 8 and time.perf_counter() - started < 0.5:
            step()
            steps += 1
        return (time.perf_counter() - started) / steps

    with torch.inference_mode():
        best = seconds(most)
        while most > 1 and (fewer := seconds(most // 2)) < 1.2 * best:
            most, best = most // 2, min(best, fewer)
    return most
