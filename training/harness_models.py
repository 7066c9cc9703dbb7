"""A checkpoint's module and a served endpoint, as models of lm-evaluation-harness that see the same tokens.

The harness' own classes for the two tokenise, truncate and cut long text each in its way. Here :class:`SameTokens`
does all three, and they only compute log-probabilities. A request is at most ``window - 1`` tokens on both sides,
because an endpoint must have room for the one token that it generates.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openai
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import modeling  # noqa: F401  registers the architectures

CONCURRENT = 8  # requests that an endpoint gets at a time
ATTEMPTS = 5  # of each, with pauses from 1 to 10 seconds
PROBE = "The patient was seen by a doctor. "


class SameTokens:
    """What both models do the same way: text to token ids, and to requests that fit the window."""

    tokenizer: PreTrainedTokenizerBase
    limit: int  # tokens of a request, context and continuation together
    truncated: dict[str, set[int]]  # by task, the rows whose context was cut

    def _prepare(self, window: int) -> None:
        if window < 3:
            raise ValueError(f"a window of {window} tokens leaves no room for a context; set --window")
        if self.prefix_token_id is None:  # type: ignore[attr-defined]
            raise ValueError(
                "the tokenizer has neither a beginning-of-text nor an end-of-text token to start text with"
            )
        self.limit, self.truncated = window - 1, defaultdict(set)

    def tok_encode(self, string: Any, **kwargs: Any) -> Any:
        """Token ids of a string, or of each of a list; no special tokens are added."""
        return self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each request's continuation, given its context, which loses tokens on its left where both do not fit.

        Raises:
            ValueError: a continuation that does not fit by itself.
        """
        encoded = []
        for request in requests:
            context, continuation = request.args
            if context:
                before, after = self._encode_pair(context, continuation)  # type: ignore[attr-defined]
            else:
                before, after = [self.prefix_token_id], self.tok_encode(continuation)  # type: ignore[attr-defined]
            if not 0 < len(after) < self.limit:
                raise ValueError(
                    f"{request.task_name}, row {request.doc_id + 1}: an answer of {len(after)} tokens, where 1 to "
                    f"{self.limit - 1} fit the window"
                )
            room = self.limit - len(after)
            if len(before) > room:
                self.truncated[request.task_name].add(request.doc_id)
                before = before[-room:]
            encoded.append((request.args, before, after))
        return self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)  # type: ignore[attr-defined]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of each request's whole text, in pieces that fit the window.

        The first piece follows the tokenizer's beginning-of-text token, or its end-of-text token if it has no other;
        each later one sees the last token before it; the last piece has as much before it as the window holds.
        """
        pieces, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for piece in get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,  # type: ignore[attr-defined]
                max_seq_len=self.limit - 1,
                context_len=1,
            ):
                pieces.append((None, *make_disjoint_window(piece)))
                owners.append(i)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(pieces, disable_tqdm=disable_tqdm)  # type: ignore[attr-defined]
        for i, (score, _) in zip(owners, scores, strict=True):
            sums[i] += score
        return sums


class Module(SameTokens, HFLM):
    """The trained module itself in float32, on a GPU if there is one.

    Args:
        directory: of the checkpoint.
        tokenizer: directory of its tokenizer.
        window: tokens; the model's positions if None.
        batch_size: sequences computed at a time.

    Raises:
        ValueError: no causal model, no tokenizer, or a window longer than the model's.
    """

    def __init__(self, directory: Path, tokenizer: Path, window: int | None = None, batch_size: int = 8) -> None:
        positions = _positions(directory)
        if window and window > positions:
            raise ValueError(f"--window {window}: {directory.name} has {positions} positions")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).to(device)
        self.window = window or positions
        super().__init__(
            pretrained=model, backend="causal", tokenizer=load_tokenizer(tokenizer), max_length=self.window,
            batch_size=batch_size, add_bos_token=False,
        )  # fmt: skip
        self._prepare(self.window)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        # The base class computes requests once whose ids agree in all but the last, and scores all of them in the place
        # of the longest continuation: wrong numbers where context and continuation are divided differently, as are the
        # last pieces of two texts with a common end.
        lengths: dict[tuple[int, ...], int] = {}
        self.logits_cache = all(
            lengths.setdefault((*before, *after[:-1]), len(after)) == len(after) for _, before, after in requests
        )
        return super()._loglikelihood_tokens(requests, **kwargs)


class Endpoint(SameTokens, LocalCompletionsAPI):
    """A model behind ``/v1/completions``, which is sent token ids and echoes them with their log-probabilities.

    Args:
        url: base URL, with ``/v1``.
        tokenizer: directory of the served model's tokenizer; its ``config.json``, if there, tells the window.
        key: of the API.
        model: the server's first if None.
        window: tokens, prompt and answer together; the server's own or the checkpoint's if None.
        batch_size: prompts of a request.

    Raises:
        ValueError: an unknown window, a tokenizer other than the server's, or a server that does not echo.
        openai.APIError: the server refused a request or was not there.
    """

    def __init__(
        self, url: str, tokenizer: Path, key: str | None = None, model: str | None = None, window: int | None = None,
        batch_size: int = 8, seed: int = 1234,
    ) -> None:  # fmt: skip
        key, loaded = key or "unused", load_tokenizer(tokenizer)
        with openai.OpenAI(base_url=url, api_key=key) as client:
            cards = {card.id: card for card in client.models.list()}
            if not cards or (model and model not in cards):
                raise ValueError(f"{url} serves {', '.join(cards) or 'nothing'}; set --model")
            model = model or next(iter(cards))
            positions = (cards[model].model_extra or {}).get("max_model_len")  # vLLM's own servers tell it
            if not positions and (tokenizer / "config.json").is_file():
                positions = _positions(tokenizer)
            self.window = window or positions
            if not self.window:
                raise ValueError(f"{url} does not say how many tokens {model} takes: set --window")
            self.served = model
            super().__init__(
                base_url=f"{url.rstrip('/')}/completions", model=model, tokenizer=str(tokenizer),
                tokenizer_backend="huggingface", max_length=self.window, batch_size=batch_size, seed=seed,
                num_concurrent=CONCURRENT, max_retries=ATTEMPTS, header={"Authorization": f"Bearer {key}"},
            )  # fmt: skip
            self.tokenizer = loaded
            self._prepare(self.window)
            self._probe(client, url)

    def _probe(self, client: openai.OpenAI, url: str) -> None:
        """One request of the full window, before any row: it finds what a run would fail by, and says it plainly."""
        ids = self.tok_encode(PROBE * self.limit)[: self.limit]
        try:
            answer = client.completions.create(
                model=self.served, prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0
            )
        except openai.BadRequestError as e:
            if e.code == "context_length_exceeded":
                raise ValueError(
                    f"{url} takes fewer than {self.window} tokens: set --window to its --max-model-len"
                ) from None
            if e.code == "invalid_token_id":
                raise ValueError(f"--tokenizer is not the tokenizer of {self.served}: {e.message}") from None
            raise
        choice = answer.choices[0]
        scores = choice.logprobs.token_logprobs if choice.logprobs else None
        if not scores or len(scores) < len(ids):
            raise ValueError(f"{url} does not return a prompt's log-probabilities (echo with logprobs)")
        # Nothing but white space where a model is served without a tokenizer.
        if choice.text.strip() and not choice.text.strip().startswith(self.tokenizer.decode(ids).strip()):
            raise ValueError(f"--tokenizer is not the tokenizer of {self.served}: it reads the ids as other text")

    @staticmethod
    def parse_logprobs(
        outputs: Any, tokens: Any = None, ctxlens: Any = None, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of each continuation's log-probabilities, and whether each of its tokens was the likeliest.

        The base class takes all but the last; a server that ends without the generated token would lose one of ours.
        """
        results = []
        choices = sorted(outputs["choices"], key=lambda choice: choice["index"])
        for choice, ids, start in zip(choices, tokens, ctxlens, strict=True):
            scores = choice["logprobs"]["token_logprobs"][start : len(ids)]
            best = choice["logprobs"]["top_logprobs"][start : len(ids)]
            if len(scores) != len(ids) - start:
                raise ValueError("the server returned fewer log-probabilities than the prompt has tokens")
            greedy = all(score >= max(top.values()) for score, top in zip(scores, best, strict=True))
            results.append((sum(scores), greedy))
        return results


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory on this machine.

    Raises:
        ValueError: there is none.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise ValueError(f"{directory} has no tokenizer: give a directory that has one as --tokenizer")
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def _positions(directory: Path) -> int:
    """Longest sequence of the model that ``config.json`` describes, in tokens."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    if getattr(config, "causal", True) is False:
        raise ValueError(
            f"{directory.name} is not causal (config.json): each token sees those after it, so the likelihood that it "
            "gives a continuation means nothing"
        )
    return int(config.max_position_embeddings)
