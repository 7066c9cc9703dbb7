"""The check of a request: its form, then what the model's settings allow."""

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from pydantic import ValidationError

from serving.gateway.errors import ApiError
from serving.gateway.parameters import optional, text
from serving.gateway.parameters.conversation import (
    check_media,
    check_messages,
    check_text,
    check_tools,
    without_dropped,
)
from serving.gateway.parameters.fields import MAX_INPUTS, MAX_SEQUENCES
from serving.gateway.parameters.refusals import from_validation, wrong
from serving.gateway.parameters.requests import ROUTES
from serving.gateway.parameters.schemas import Spent, check_schema
from serving.gateway.settings import Model

_GUESS = 256  # tokens of an answer whose length was not asked for
_COMPLETION = 16  # the same of /v1/completions: OpenAI's and vLLM's default

# Accepted, but for the gateway or for nobody: not sent upstream.
_IGNORED = frozenset((
    "user", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "modalities",
    "background", "previous_response_id",
))  # fmt: skip
# Fields of a completion request that need a tokenizer, and what works without.
_NEEDS_TOKENIZER = {
    "stop": "stop_token_ids",
    "bad_words": "logit_bias",
    "suffix": None,
    "response_format": None,
    "structured_outputs": None,
    "use_beam_search": None,
}


@dataclass(slots=True)
class Checked:
    """A request that may go to an engine.

    Attributes:
        body: what is sent; ``model`` is still the client's name of it.
        stream: whether the answer is one.
        prompt_tokens: estimate of all prompts together: a quarter of their bytes, or the number of ids.
        max_tokens: of all answers together, as asked for; 256 each (completions: 16) where nothing was; 0 for routes
            that generate nothing.
        open_ended: the request does not say how long its answer may be.
        usage_added: the stream reports its usage because of us; the client did not ask for it.
        chunk_usage_added: so does every chunk of it, see ``count_chunks``.
        prefixes: hashes of the prompt's first 64, 256, 1024, ... bytes, shortest first; at most 8.
        prompts, answers: how many; ``answers`` to each prompt.
        salted: the body has a tenant's ``cache_salt``.
    """

    body: dict[str, Any]
    stream: bool
    prompt_tokens: int = 0
    max_tokens: int = 0
    open_ended: bool = False
    usage_added: bool = False
    chunk_usage_added: bool = False
    prefixes: tuple[int, ...] = ()
    prompts: int = 1
    answers: int = 1
    salted: bool = False

    def count_chunks(self) -> None:
        """Asks for the usage with every chunk of a stream, so that one which is left can be counted as well."""
        options = self.body.get("stream_options")
        if options is not None:
            self.chunk_usage_added = self.usage_added or options.get("continuous_usage_stats") is not True
            options["continuous_usage_stats"] = True


def check(route: str, request: dict[str, Any], model: Model) -> Checked:
    """Checks a request against its route's schema and its model's limits.

    ``request`` stays as it is; parts of it are shared with the result.

    Args:
        route: one of ``ROUTES``.

    Raises:
        ApiError: 400, with the field in ``param``.
    """
    form = _FORMS[route]
    if not model.has_tokenizer:
        _check_wordless(route, request)
    limits = model.limits
    further = request.keys() - form.fields
    spent = Spent()
    taken = optional.take(request, further, limits, spent) if further else {}
    for name in limits.deny:
        if request.get(name) is not None:
            raise ApiError(400, f"the parameter {name} is not allowed for this model", "unknown_parameter", name)
    known = {name: value for name, value in request.items() if name not in further} if further else request
    try:
        form.validate(known)
    except ValidationError as e:
        raise from_validation(e) from None
    body = {name: value for name, value in known.items() if value is not None and name in form.upstream}
    if taken:
        body |= taken
    checked = Checked(body, request.get("stream") is True)
    form.check(checked, model, spent)
    return checked


def _check_wordless(route: str, request: dict[str, Any]) -> None:
    """Of a model without a tokenizer: ids go in and come out."""
    why = "the model has no tokenizer"
    embeds = route == "/v1/embeddings"
    field = "input" if embeds else "prompt"
    if not embeds and (route != "/v1/completions" or "messages" in request or "prompt" not in request):
        raise ApiError(400, f"{why} and no chat: send token ids to /v1/completions", "no_tokenizer", "messages")
    given = request.get(field)
    if not isinstance(given, list) or any(isinstance(part, str) for part in given):
        raise ApiError(400, f"{why}: {field} must be a list of token ids", "no_tokenizer", field)
    for name, instead in _NEEDS_TOKENIZER.items():
        if request.get(name):
            use = f"; use {instead}" if instead else ""
            raise ApiError(400, f"{why}: {name} needs one{use}", "no_tokenizer", name)


def _check_sampling(checked: Checked, model: Model, length_field: str, guess: int, sequences: int = 1) -> None:
    """Caps that all routes share, and the length of answers."""
    body, limits = checked.body, model.limits
    for name in ("logprobs", "top_logprobs", "prompt_logprobs"):
        count = body.get(name)
        if type(count) is int and count > limits.logprobs:
            raise wrong(name, f"must be at most {limits.logprobs}, not {count}")
    for name in ("stop", "stop_sequences"):
        stops = body.get(name)
        if type(stops) is list and len(stops) > limits.stop:
            raise wrong(name, f"must have at most {limits.stop} entries, not {len(stops)}")
    for name in ("stop_token_ids", "allowed_token_ids", "logprob_token_ids"):
        if body.get(name):
            text.check_ids(body[name], model.vocab_size, name)
    if body.get("logit_bias"):
        text.check_ids([int(token) for token in body["logit_bias"]], model.vocab_size, "logit_bias")
    asked = body.get(length_field)
    checked.open_ended = asked is None and guess != _COMPLETION
    if limits.max_tokens is not None:
        for name in (length_field, "max_tokens", "min_tokens"):
            count = body.get(name)
            if count is not None and count > limits.max_tokens:
                raise wrong(name, f"must be at most {limits.max_tokens}, not {count}")
        if asked is None and (guess != _COMPLETION or guess > limits.max_tokens):
            body[length_field] = limits.max_tokens
            guess = limits.max_tokens
    length = guess if asked is None else asked
    if body.get("min_tokens", 0) > length and (asked is not None or guess == _COMPLETION):
        raise wrong("min_tokens", f"must be at most {length_field}, which is {length}, not {body['min_tokens']}")
    checked.max_tokens = length * sequences


def _check_stream(checked: Checked) -> None:
    """Streams of OpenAI's older routes report their usage, whether or not the client asked."""
    options = checked.body.get("stream_options")
    if not checked.stream:
        if options is not None:
            raise wrong("stream_options", "is only allowed with stream: true")
        return
    if checked.body.get("prompt_logprobs"):
        raise wrong("prompt_logprobs", "is not available with stream: true")
    if options is None:
        checked.body["stream_options"], checked.usage_added = {"include_usage": True}, True
        return
    checked.usage_added = options.get("include_usage") is not True
    known = {name: value for name, value in options.items() if value is not None and name != "include_obfuscation"}
    checked.body["stream_options"] = known | {"include_usage": True}


def _check_answers(checked: Checked, model: Model) -> int:
    n: int = checked.body.get("n", 1)
    if n > model.limits.n:
        raise wrong("n", f"must be at most {model.limits.n}, not {n}")
    checked.answers = n
    return n


def _check_format(body: dict[str, Any], model: Model, spent: Spent) -> None:
    answer = body.get("response_format")
    if answer is not None and answer["type"] == "json_schema":
        _check_described(answer["json_schema"], "response_format.json_schema", model, spent)
    if ("allowed_token_ids" in body or "bad_words" in body) and (constrained := _constrained(body)):
        for name in ("allowed_token_ids", "bad_words"):
            if body.get(name):  # vLLM fails when nothing is left that both allow
                raise wrong(name, f"is not available with {constrained}")


def _check_described(answer: dict[str, Any], param: str, model: Model, spent: Spent) -> None:
    check_schema(answer["schema"], f"{param}.schema", model.limits, spent)
    if answer.get("description"):
        check_text(answer["description"], f"{param}.description", model.limits)


def _constrained(body: dict[str, Any]) -> str | None:
    """What makes the engine compile a grammar that the answer must follow."""
    if (body.get("response_format") or {}).get("type", "text") != "text":
        return "a response_format"
    for name in ("text", "output_config"):
        answer = (body.get(name) or {}).get("format")
        if answer is not None and answer["type"] != "text":
            return f"a {name}.format"
    if body.get("structured_outputs"):
        return "structured_outputs"
    choice = body.get("tool_choice")
    if choice == "required" or (type(choice) is dict and choice["type"] in ("function", "tool", "any")):
        return "a tool_choice that forces a call"
    return None


def _check_conversation(checked: Checked, model: Model, spent: Spent, field: str | None, *more: str) -> None:
    """Tools, texts in fields of their own (``more``), and the messages in ``field``."""
    body = checked.body
    texts: list[str] = []
    if body.get("tools"):
        texts.append(check_tools(body["tools"], model.limits, spent))
    for name in more:
        value = body.get(name)
        if value is not None:
            whole = value if type(value) is str else "".join(part["text"] for part in value)
            check_text(whole, name, model.limits)
            texts.append(whole)
    if field is not None:
        body[field], said = check_messages(body[field], field, model.limits)
        texts += said
    checked.prompt_tokens = text.estimate(texts)
    checked.prefixes = text.prefixes_of_text(texts)


def _check_chat(checked: Checked, model: Model, spent: Spent) -> None:
    body = checked.body
    sequences = _check_answers(checked, model)
    length_field = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    _check_sampling(checked, model, length_field, _GUESS, sequences)
    _check_stream(checked)
    if "top_logprobs" in body and body.get("logprobs") is not True:
        raise wrong("top_logprobs", "is only allowed with logprobs: true")
    if body.get("tool_choice", "none") != "none" and "tools" not in body:
        raise wrong("tool_choice", "is only allowed with tools")
    _check_format(body, model, spent)
    body.pop("metadata", None)
    _check_conversation(checked, model, spent, "messages")


def _check_completion(checked: Checked, model: Model, spent: Spent) -> None:
    body = checked.body
    n = _check_answers(checked, model)
    texts, ids = text.prompts(body.get("prompt"), "prompt", MAX_SEQUENCES, model.vocab_size)
    count = len(texts) + len(ids)
    name, width = max(("n", n), ("best_of", body.get("best_of", 1)), key=itemgetter(1))
    if count * width > MAX_SEQUENCES:
        raise wrong(name, f"times the {count} prompts must be at most {MAX_SEQUENCES}, not {count * width}")
    if body.get("max_tokens") == 0 and body.get("echo") is not True:
        raise wrong("max_tokens", "must be at least 1 without echo: true")
    _check_sampling(checked, model, "max_tokens", _COMPLETION, count * n)
    _check_stream(checked)
    _check_format(body, model, spent)
    _check_prompts(checked, texts, ids, "prompt")
    if "suffix" in body:
        check_media(body["suffix"], "suffix")
    if not model.has_tokenizer:
        # An answer of text would be empty; log-probabilities name tokens by id.
        body |= {"return_token_ids": True, "return_tokens_as_token_ids": True}


def _check_prompts(checked: Checked, texts: list[str], ids: list[list[int]], field: str) -> None:
    checked.prompts = len(texts) + len(ids)
    if texts:
        for prompt in texts:
            check_media(prompt, field)
        checked.prompt_tokens = text.estimate(texts)
        checked.prefixes = text.prefixes_of_text(texts[:1])
    else:
        checked.prompt_tokens = sum(map(len, ids))
        checked.prefixes = text.prefixes_of_ids(ids[0])


def _check_embedding(checked: Checked, model: Model, _spent: Spent) -> None:
    texts, ids = text.prompts(checked.body.get("input"), "input", MAX_INPUTS, model.vocab_size)
    if "" in texts:
        raise wrong("input", "must not hold an empty text")
    _check_prompts(checked, texts, ids, "input")


def _check_responses(checked: Checked, model: Model, spent: Spent) -> None:
    body = checked.body
    _check_sampling(checked, model, "max_output_tokens", _GUESS)
    answer = (body.get("text") or {}).get("format")
    if answer is not None and answer["type"] == "json_schema":
        _check_described(answer, "text.format", model, spent)
    _check_format(body, model, spent)
    body.pop("stream_options", None)
    body["store"] = False  # vLLM's default is to keep it
    if type(body["input"]) is str:
        _check_conversation(checked, model, spent, None, "instructions", "input")
    else:
        _check_conversation(checked, model, spent, "input", "instructions")


def _check_anthropic(checked: Checked, model: Model, spent: Spent) -> None:
    body = checked.body
    _check_sampling(checked, model, "max_tokens", _GUESS)
    budget = (body.get("thinking") or {}).get("budget_tokens", 0)
    if budget >= body["max_tokens"]:
        raise wrong("thinking.budget_tokens", f"must be below max_tokens, which is {body['max_tokens']}, not {budget}")
    answer = (body.get("output_config") or {}).get("format")
    if answer is not None:
        check_schema(answer["schema"], "output_config.format.schema", model.limits, spent)
    _check_format(body, model, spent)
    body.pop("metadata", None)
    _check_conversation(checked, model, spent, "messages", "system")
    for name in ("system", "tools"):
        if type(body.get(name)) is list:
            body[name] = [without_dropped(part) for part in body[name]]


def _check_tokenize(checked: Checked, model: Model, spent: Spent) -> None:
    body = checked.body
    if ("prompt" in body) == ("messages" in body):
        raise wrong("prompt", "or messages must be there, and not both")
    if "prompt" in body:
        for name in ("tools", "add_generation_prompt", "continue_final_message"):
            if name in body:
                raise wrong(name, "is only allowed with messages")
        _check_prompts(checked, [body["prompt"]], [], "prompt")
    else:
        _check_conversation(checked, model, spent, "messages")


class _Form:
    """A route's schema and its further check."""

    def __init__(self, route: str, further: Callable[[Checked, Model, Spent], None]) -> None:
        schema = ROUTES[route]
        self.fields = frozenset(schema.model_fields)
        self.upstream = self.fields - _IGNORED
        self.validate: Callable[[dict[str, Any]], Any] = schema.__pydantic_validator__.validate_python
        self.check = further


_FORMS = {
    "/v1/chat/completions": _Form("/v1/chat/completions", _check_chat),
    "/v1/completions": _Form("/v1/completions", _check_completion),
    "/v1/embeddings": _Form("/v1/embeddings", _check_embedding),
    "/v1/responses": _Form("/v1/responses", _check_responses),
    "/v1/messages": _Form("/v1/messages", _check_anthropic),
    "/tokenize": _Form("/tokenize", _check_tokenize),
}
