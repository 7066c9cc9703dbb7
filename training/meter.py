"""What a run measures of itself: throughput, the share of the hardware that it uses, time left, memory, loss spikes,
and bytes, by which the losses of different tokenizers can be compared.

    tokens/s = tokens / seconds of training       MFU = tokens/s * FLOPs of a token / (peak of a GPU * GPUs)
    bits per byte = nats / (ln 2 * bytes of the text)

FLOPs and peaks are :mod:`training.flops`'.
"""

import math
import resource
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

RECENT = 100  # steps


class Meter:
    """Throughput and seconds left, over the time spent training (evaluation and checkpoints left out).

    ``tokens_per_second`` is of the last ``RECENT`` steps, so that the first ones, which compile and warm up, do not
    stay in it; ``tokens / seconds`` is of the whole process.

    Args:
        steps: steps of the whole run.
        done: steps made before this process.
        flops_per_token: of the model, forward and backward.
        peak: FLOP/s of all GPUs of the run together; None: not known, and there is no MFU.
        clock: seconds; replaceable in tests.

    Attributes:
        tokens, seconds: made and spent in training by this process.
        skipped: steps of this process whose gradient was not finite.
    """

    def __init__(
        self,
        steps: int,
        done: int = 0,
        flops_per_token: float = 0.0,
        peak: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.steps, self.step = steps, done
        self.flops_per_token, self.peak = flops_per_token, peak
        self.tokens, self.skipped, self.seconds = 0, 0, 0.0
        self._recent: deque[tuple[int, float]] = deque([(0, 0.0)], RECENT + 1)  # tokens and seconds after each step
        self._clock = clock
        self._since: float | None = clock()

    def pause(self) -> None:
        """What follows is no training; a second call changes nothing."""
        self._count()
        self._since = None

    def resume(self) -> None:
        """What follows is training again."""
        self._count()
        self._since = self._clock()

    def update(self, tokens: int, skipped: bool = False) -> None:
        """One optimizer step over ``tokens`` input tokens, of all ranks, is done; a GPU must have been waited for."""
        self._count()
        self.tokens += tokens
        self.skipped += skipped
        self.step += 1
        self._recent.append((self.tokens, self.seconds))

    def _count(self) -> None:
        if self._since is not None:
            now = self._clock()
            self.seconds += now - self._since
            self._since = now

    @property
    def tokens_per_second(self) -> float:
        (first_tokens, first), (last_tokens, last) = self._recent[0], self._recent[-1]
        return (last_tokens - first_tokens) / (last - first) if last > first else 0.0

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation: 1 is all that the GPUs could do."""
        return self.tokens_per_second * self.flops_per_token / self.peak if self.peak else None

    @property
    def seconds_left(self) -> float:
        made = len(self._recent) - 1
        return (self.steps - self.step) * (self._recent[-1][1] - self._recent[0][1]) / made if made else 0.0


def peak_memory() -> int:
    """Bytes: the most that tensors have taken on this process' GPU, else the most the process has had in memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # The one figure of getrusage whose unit differs between systems.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Spike(NamedTuple):
    """A loss far above those before it; ``expected`` is their median."""

    step: int
    loss: float
    expected: float


class SpikeDetector:
    """Reports losses that stand out from the last ``window``.

    A loss is a spike that is above their median by more than ``sigmas`` standard deviations (estimated from the median
    absolute deviation, which one spike does not move) and by more than a tenth of it. Of spikes that follow one another
    the first is reported. A drift, however far it goes, stays within the spread that it makes itself.

    Args:
        window: losses that a new one is compared with.
        least: losses that it takes before anything is reported.
        sigmas: how far is too far.
    """

    def __init__(self, window: int = 100, least: int = 50, sigmas: float = 6.0) -> None:
        self.least, self.sigmas = least, sigmas
        self._losses: deque[float] = deque(maxlen=window)
        self._spiking = False

    def update(self, step: int, loss: float) -> Spike | None:
        """Takes the loss of a step. One that is not finite is not a spike but a skipped step, and ignored."""
        if not math.isfinite(loss):
            return None
        spike = None
        if len(self._losses) >= self.least:
            expected = statistics.median(self._losses)
            deviation = 1.4826 * statistics.median(abs(x - expected) for x in self._losses)
            above = loss - expected > max(self.sigmas * deviation, 0.1 * abs(expected))
            if above and not self._spiking:
                spike = Spike(step, loss, expected)
            self._spiking = above
        self._losses.append(loss)
        return spike


def token_bytes(tokenizer: Any) -> Tensor:
    """Bytes of UTF-8 that each token stands for: (V,) int64; 0 for special tokens, which stand for no text.

    The sum over a text's tokens is the length of its UTF-8, exactly, unless it spells a special token.

    Args:
        tokenizer: a fast tokenizer of byte-level BPE, trained here or made of a tiktoken encoding.

    Raises:
        ValueError: a tokenizer of another kind.
    """
    # ByteLevel writes each byte as one letter; added tokens are written as they are.
    if '"ByteLevel"' not in tokenizer.backend_tokenizer.to_str():
        raise ValueError("bits per byte need a tokenizer of byte-level BPE")
    sizes = torch.zeros(len(tokenizer), dtype=torch.int64)
    for token, token_id in tokenizer.get_vocab().items():
        sizes[token_id] = len(token)
    for token_id, added in tokenizer.added_tokens_decoder.items():
        sizes[token_id] = 0 if added.special else len(added.content.encode())
    return sizes


def bits_per_byte(nats: float, size: int) -> float:
    """Of a text of ``size`` bytes whose tokens have a summed negative log-likelihood of ``nats``."""
    return nats / (math.log(2) * size)
