"""Stand-ins with answers that can be worked out by hand, for tests of what lies above the engine."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from time import monotonic

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from icarus_jax.config import EngineConfig, HeadConfig, ModelConfig
from icarus_jax.engine.stats import EngineStats
from icarus_jax.errors import RequestError
from icarus_jax.models.head_bank import Factors
from icarus_jax.scheduling.registry import Model
from icarus_jax.scheduling.request import Request, TokenLogprob, TokenOutput
from icarus_jax.scheduling.scheduler import Scheduler

CHAT_TEMPLATE = (
    "{% for t in tools or [] %}<|im_start|>tool\n{{ t.function.name }}<|im_end|>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ mood or '' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "Hello, world! How are you today?\n",
    "naïve café 日本語 🙂 x = 1",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2, Llama 3 and Qwen have it, with ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE as Llama 2 has it: pieces with a mark for the space, bytes for what it does not know."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    letters = {char for text in CORPUS[:2] for char in text if char.isalpha()}
    pieces += [*sorted(letters), "▁H", "▁He", "ll", "▁Hell", "▁Hello"]
    merges = [("▁", "H"), ("▁H", "e"), ("l", "l"), ("▁He", "ll"), ("▁Hell", "o")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(Regex("▁"), " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@dataclasses.dataclass
class _Stream:
    request: Request
    index: int
    model: Model
    handoff: Callable[[int], str | None] | None
    on_output: Callable[[int, TokenOutput], None]
    num_output: int = 0
    cached: int = 0
    admitted_at: float | None = None


class FakeParking:
    """Parks every session that is asked for, once."""

    def __init__(self):
        self.parked: list[str] = []
        self.fail: Exception | None = None  # what comes in place of the result
        self.hangs = False

    def park(self, session: str) -> Future[bool]:
        future: Future[bool] = Future()
        if self.fail:
            future.set_exception(self.fail)
        elif not self.hangs:
            future.set_result(session not in self.parked)
            self.parked.append(session)
        return future


class FakeEngine:
    """The engine's interface. Output token i of the models, for a prompt p of length n and a vocabulary of V ids:

    'trunk' counts: (p[n-1] + 1 + i) mod V. 'parrot' repeats its prompt: p[i mod n]. 'broken' counts too, and ends
    with an error in place of output token p[0]. A head loaded later says 100 + v, over and over, where v counts the
    loads; an adapter of a rank above 8 is refused. A chosen token's log-probability is -0.5, the trunk's of it -0.5 if
    the trunk chose it and -2 if not, and its k alternatives are itself and its successors, at -0.5, -1.5, ...; prompt
    token j has -j. A prompt given before is cached but for its last token.
    As in the engine, an abort takes effect between two steps: an output on its way still comes.
    """

    def __init__(
        self, vocab_size: int, eos_ids: Iterable[int] = (), step_seconds: float = 0.0, max_model_len: int = 128
    ):
        kinds = {"trunk": "base", "parrot": "shared", "broken": "isolated"}
        self.models = {name: Model(name, kind) for name, kind in kinds.items()}
        self.config = EngineConfig(max_model_len=max_model_len)
        self.model_config = ModelConfig("llama", vocab_size, 8, 8, 1, 1, 1, 8)
        self.scheduler = Scheduler(self.config, num_slots=2)  # /metrics reads it; it schedules nothing
        self.stats = EngineStats(pages_total=self.config.num_pages)
        self.eos_ids = frozenset(eos_ids)
        self.step_seconds = step_seconds
        self.aborted: list[int] = []  # of sequences that were running
        self._to_abort: list[int] = []
        self.requests: list[Request] = []
        self.loaded: list[HeadConfig] = []
        self.released: list[str] = []  # sessions
        self.parking = FakeParking()
        self._says: dict[Model, int] = {}
        self.failed = False
        self.fail: Exception | None = None  # raised by submit
        self._streams: dict[int, _Stream] = {}
        self._ids = itertools.count()
        self._stopping = False
        self._lock = threading.Condition()
        self._thread = threading.Thread(target=self._loop, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def shutdown(self, drain: bool = True) -> None:
        with self._lock:
            self._stopping = True
            if not drain:
                self._streams.clear()
            self._lock.notify()
        self._thread.join()

    @property
    def running(self) -> int:
        with self._lock:
            return len(self._streams)

    def submit(self, request: Request, on_output: Callable[[int, TokenOutput], None]) -> list[int]:
        if self.fail:
            raise self.fail
        if self.failed:
            raise RequestError("the engine has failed")
        if missing := set(request.models) - self.models.keys():
            raise RequestError(f"no model {missing}", "model")
        with self._lock:
            seen = any(r.prompt_ids == request.prompt_ids for r in self.requests)
            self.requests.append(request)
            writers = [self.models[name] for name in request.models for _ in range(request.n)]
            ids = [next(self._ids) for _ in writers]
            cached = len(request.prompt_ids) - 1 if seen else 0
            for i, (seq, model) in enumerate(zip(ids, writers, strict=True)):
                watch = request.handoff and request.handoff()
                self._streams[seq] = _Stream(request, i, model, watch, on_output, cached=cached)
            self.stats.requests += len(ids)
            self.stats.cached_tokens_cross_model += cached
            self._lock.notify()
        return ids

    def abort(self, seq_ids: Iterable[int]) -> None:
        with self._lock:
            self._to_abort += seq_ids

    def load_head(self, head: HeadConfig, factors: Factors) -> None:
        if any(a.shape[-1] > 8 for a, _ in factors.values()):
            raise ValueError("the rank is above 8")
        with self._lock:
            model = Model(head.name, head.kv)
            self.loaded.append(head)
            self._says[model] = 99 + len(self.loaded)
            self.models = self.models | {head.name: model}

    def unload_head(self, name: str) -> None:
        with self._lock:
            self.models = {other: model for other, model in self.models.items() if other != name}

    def release_session(self, session: str) -> bool:
        self.released.append(session)
        return any(r.session and r.session.id == session for r in self.requests)

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._streams or self._stopping)
                if not self._streams:
                    return
            time.sleep(self.step_seconds)
            with self._lock:
                for seq_id, stream in list(self._streams.items()):
                    output = self._step(seq_id, stream)
                    if output.finish_reason:
                        del self._streams[seq_id]
                    stream.on_output(stream.index, output)
                self.aborted += [seq_id for seq_id in self._to_abort if self._streams.pop(seq_id, None)]
                self._to_abort.clear()

    def _scored(self, token_id: int, logprob: float, count: int) -> TokenLogprob:
        top = tuple(((token_id + k) % self.model_config.vocab_size, logprob - k) for k in range(count))
        return TokenLogprob(token_id, logprob, top)

    def _step(self, seq_id: int, stream: _Stream) -> TokenOutput:
        request, params = stream.request, stream.request.params
        prompt, i = request.prompt_ids, stream.num_output
        stream.admitted_at = stream.admitted_at or monotonic()  # tests replace `time`
        output = TokenOutput(seq_id, [], stream.model.name, cached_tokens=stream.cached, admitted_at=stream.admitted_at)
        if params.prompt_logprobs is not None and i == 0:
            scores = [self._scored(token, -float(j), params.prompt_logprobs) for j, token in enumerate(prompt)]
            output.prompt_logprobs = [None, *scores[1:]]
        if stream.model.name == "broken" and i == prompt[0]:
            output.finish_reason = "error"
        elif params.max_tokens > 0:
            token = prompt[i % len(prompt)] if stream.model.name == "parrot" else prompt[-1] + 1 + i
            token = self._says.get(stream.model, token % self.model_config.vocab_size)
            output.token_ids = [token]
            if params.logprobs is not None:
                output.logprobs = [self._scored(token, -0.5, params.logprobs)]
            if request.reference_logprobs:
                output.reference_logprobs = [-0.5 if stream.model.kind == "base" else -2.0]
            if stream.handoff and (name := stream.handoff(token)):
                stream.model = self.models[name]
            ends = token in params.stop_token_ids or (token in self.eos_ids and not params.ignore_eos)
            if ends and i >= params.min_tokens:
                output.finish_reason = "stop"
        stream.num_output += 1
        if output.finish_reason is None and stream.num_output >= params.max_tokens:
            output.finish_reason = "length"
        return output


def main() -> None:
    """Serves the double, in a process of its own (for tests of signals)."""
    from icarus_jax.server.app import create_app, run
    from icarus_jax.server.head_loader import HeadLoader

    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step_seconds", type=float, default=0.05)
    parser.add_argument("--drain_seconds", type=float, default=120)
    args = parser.parse_args()
    tokenizer = byte_level_tokenizer()
    engine = FakeEngine(len(tokenizer), (), args.step_seconds)
    engine.start()
    signal.signal(signal.SIGUSR1, lambda *_: setattr(engine, "failed", True))
    app = create_app(engine, tokenizer, (), HeadLoader(engine, "trunk"))
    run(app, engine, "127.0.0.1", args.port, args.drain_seconds)


if __name__ == "__main__":
    main()
