"""Features of an engine behind the gateway: adapters, speculation, parallelism, quantised weights, no tokenizer.

Small random checkpoints of 512 positions, with weights large enough that a mistake shows. What is served is compared
with the torch module, without a cache.
"""

import json
import re
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling import checkpoint, fingerprint
from modeling.fingerprint import probe_ids
from modeling.registry import REGISTRY
from modeling.tokenizers import train_bpe
from tests.e2e.server import Server
from tests.e2e.test_faults import named
from tests.lora import merge, write_adapter
from tests.quantised import quantised, write_quantised

pytestmark = pytest.mark.engine
POSITIONS, VOCABULARY, TOLERANCE = 512, 260, 1e-4
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL_CACHE = ("--kv-cache-gib", "0.1", "--threads", "1")


def write_random(directory: Path, model_type: str = "medassist_gpt", noise: float = 0.0, **changes: Any) -> Path:
    """A checkpoint of the architecture's tiny size; ``noise`` makes one that computes nearly the same."""
    tokenizer = train_bpe(["a small text"], VOCABULARY, POSITIONS)
    config = REGISTRY[model_type].config_class().tiny(vocab_size=VOCABULARY, **changes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.ndim == 1))
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    checkpoint.write(directory, model, tokenizer)
    return directory


def module(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def answer(server: Server, ids: list[int], tokens: int, model: str = "", **more: object) -> dict[str, Any]:
    """The first choice of a greedy completion, with log-probabilities of prompt and answer."""
    body = {"model": model or server.model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
            "echo": True, "logprobs": 0, "return_token_ids": True}  # fmt: skip
    status, text = server.post("/v1/completions", body | more)
    assert status == 200, text
    choice: dict[str, Any] = json.loads(text)["choices"][0]
    return choice


def differences(reference: Any, ids: list[int], choice: dict[str, Any]) -> torch.Tensor:
    """How far each log-probability of an answer is from the module's; its tokens must be the module's likeliest."""
    chosen = choice["token_ids"]
    whole = torch.tensor([ids + chosen])
    with torch.no_grad():
        expected = reference(whole, use_cache=False).logits[0].log_softmax(-1)
    assert chosen == expected[len(ids) - 1 : -1].argmax(-1).tolist()
    scores = expected[:-1].gather(1, whole[0, 1:, None])[:, 0]
    return (torch.tensor(choice["logprobs"]["token_logprobs"][1:]) - scores).abs()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("features")


@pytest.fixture(scope="module")
def base(directory: Path) -> Path:
    return write_random(directory / "base", rope_layout="flattened")


@pytest.fixture(scope="module")
def adapted(directory: Path, base: Path) -> Iterator[Server]:
    """The base model with two adapters, which fill all of the slots they are given, and drafts from repeated text."""
    write_adapter(directory / "everything", base, PROJECTIONS, seed=1)
    write_adapter(directory / "keys", base, ["k_proj"], rank=4, seed=2)
    adapters = [f"--lora={name}={directory / name}" for name in ("everything", "keys")]
    server = Server(base, directory / "adapted", *SMALL_CACHE, *adapters, "--speculative", "ngram")
    yield server.wait_ready()
    server.stop()


def test_adapters_are_models_of_their_own(adapted: Server) -> None:
    cards = {card["id"]: card for card in json.loads(adapted.get("/v1/models")[1])["data"]}
    assert {name: card["parent"] for name, card in cards.items()} == {
        "base": None,
        "everything": "base",
        "keys": "base",
    }
    assert json.loads(adapted.get("/v1/models/keys")[1])["root"] == "base"


def test_a_served_adapter_is_the_merged_one_and_the_base_stays_as_it_was(
    adapted: Server, directory: Path, base: Path
) -> None:
    """Requests for both adapters and the base model, all at once."""
    modules = {"base": module(base)}
    for name in ("everything", "keys"):
        modules[name] = merge(module(base), directory / name)
    asked = [(probe_ids(length, 256), name) for length in (1, 5, 64, 129, 300, 480) for name in modules]
    with ThreadPoolExecutor(len(asked)) as threads:
        answers = list(threads.map(lambda request: answer(adapted, request[0], 12, request[1]), asked))
    for (ids, name), choice in zip(asked, answers, strict=True):
        assert differences(modules[name], ids, choice).max() < TOLERANCE, (name, len(ids))
    # Each adapter matters: at equal prompts, the three models say different things.
    scores = [torch.tensor(choice["logprobs"]["token_logprobs"][1:129]) for choice in answers[9:12]]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (scores[one] - scores[other]).abs().max() > 0.1


def test_drafts_from_repeated_text_change_no_token(adapted: Server, base: Path) -> None:
    ids = [7, 8, 9, 10, 11, 12] * 30
    before = adapted.engine_metric("spec_decode_num_drafts_total")
    choice = answer(adapted, ids, 100)
    assert differences(module(base), ids, choice).max() < TOLERANCE
    assert adapted.engine_metric("spec_decode_num_drafts_total") > before


def test_an_adapter_of_another_model_is_refused_before_anything_is_loaded(directory: Path, base: Path) -> None:
    other = write_random(directory / "other", "tinymorfer")
    write_adapter(directory / "foreign", other, ["qkv_proj"])
    server = Server(base, directory / "foreign-logs", f"--lora=foreign={directory / 'foreign'}")
    assert server.process.wait(60) == 2
    assert "qkv_proj" in server.log
    assert "names no projection of this model" in server.log
    assert "Traceback" not in server.log
    assert "starting vLLM" not in server.log


CHAT = "chat/completions"
TOO_LONG = {
    "a prompt longer than the model": ("completions", {"prompt": [5] * (POSITIONS + 1), "max_tokens": 1}),
    "a prompt that leaves no room": ("completions", {"prompt": [5] * POSITIONS, "max_tokens": 1}),
    "no room, no max_tokens": ("completions", {"prompt": [5] * POSITIONS}),
    "scoring without room for one token": ("completions", {"prompt": [5] * POSITIONS, "max_tokens": 0, "echo": True}),
    "prompt and answer together": ("completions", {"prompt": [5] * (POSITIONS - 10), "max_tokens": 11}),
    "an answer longer than the model": ("completions", {"prompt": [5], "max_tokens": POSITIONS + 1}),
    "one prompt of two": ("completions", {"prompt": [[5], [5] * POSITIONS], "max_tokens": 1}),
    "a text": ("completions", {"prompt": "é" * POSITIONS, "max_tokens": 1}),
    "a text of megabytes": ("completions", {"prompt": "é" * 10**6, "max_tokens": 1}),
    "a conversation": (CHAT, {"messages": [{"role": "user", "content": "é" * POSITIONS}]}),
    "a conversation and its answer": (
        CHAT,
        {"messages": [{"role": "user", "content": "é"}], "max_completion_tokens": POSITIONS},
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("case", TOO_LONG)
def test_what_does_not_fit_is_context_length_exceeded(adapted: Server, case: str, stream: bool) -> None:
    route, body = TOO_LONG[case]
    status, text = adapted.post(f"/v1/{route}", {"model": adapted.model, "stream": stream} | body)
    assert status == 400, text
    assert json.loads(text)["error"]["code"] == "context_length_exceeded"


def test_what_just_fits_is_answered(adapted: Server) -> None:
    choice = answer(adapted, [5] * (POSITIONS - 10), 10)
    assert len(choice["token_ids"]) == 10
    assert len(answer(adapted, [5] * (POSITIONS - 1), 1)["token_ids"]) == 1


@pytest.mark.parametrize("prompt", [[VOCABULARY], [-1], [[1], [VOCABULARY]], [2**70]], ids=str)
def test_ids_outside_the_vocabulary_are_the_clients_error(adapted: Server, prompt: list) -> None:
    status, text = adapted.post("/v1/completions", {"model": adapted.model, "prompt": prompt, "max_tokens": 1})
    assert status == 400, text
    assert json.loads(text)["error"]["code"] == "invalid_token_id"
    assert answer(adapted, [VOCABULARY - 1], 1)


@pytest.fixture(scope="module")
def wordless(directory: Path, base: Path) -> Iterator[Server]:
    """A checkpoint without a tokenizer, for which one drafts that computes nearly the same."""
    draft = write_random(directory / "draft", rope_layout="flattened", noise=0.01)
    target = Path(shutil.copytree(base, directory / "wordless"))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (target / name).unlink()
    module_ = module(target)
    fingerprint.record(module_, target)
    server = Server(target, directory / "wordless-logs", *SMALL_CACHE, "--speculative", str(draft))
    yield server.wait_ready()
    server.stop()


def test_a_draft_model_changes_no_token(wordless: Server, base: Path) -> None:
    reference = module(base)
    for length in (1, 64, 130, 470):
        ids = probe_ids(length, VOCABULARY)
        assert differences(reference, ids, answer(wordless, ids, 40)).max() < TOLERANCE
    accepted = wordless.engine_metric("spec_decode_num_accepted_tokens_total")
    assert 0 < accepted < wordless.engine_metric("spec_decode_num_draft_tokens_total")


def test_without_a_tokenizer_ids_go_in_and_come_out(wordless: Server) -> None:
    body = {"model": wordless.model, "prompt": [1, 2, 3], "max_tokens": 4, "logprobs": 1, "ignore_eos": True}
    status, text = wordless.post("/v1/completions", body)
    assert status == 200, text
    choice = json.loads(text)["choices"][0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
    status, streamed = wordless.post("/v1/completions", body | {"stream": True})
    assert status == 200
    assert '"error"' not in streamed
    assert '"token_ids":[' in streamed


@pytest.mark.parametrize(
    ("route", "body", "code"),
    [
        ("completions", {"prompt": "text"}, "no_tokenizer"),
        ("completions", {"prompt": ["text", "more"]}, "no_tokenizer"),
        ("completions", {"prompt": [[1], "text"]}, "no_tokenizer"),
        ("completions", {"prompt": [1], "stop": ["."]}, "no_tokenizer"),
        ("completions", {"prompt": [1], "structured_outputs": {"regex": "a"}}, "no_tokenizer"),
        ("completions", {}, "no_tokenizer"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}]}, "no_tokenizer"),
        ("completions", {"prompt": [VOCABULARY]}, "invalid_token_id"),
        ("completions", {"prompt": [2**70]}, "invalid_token_id"),
        ("completions", {"prompt": [5] * POSITIONS}, "context_length_exceeded"),
    ],
)
def test_without_a_tokenizer_text_is_the_clients_error(wordless: Server, route: str, body: dict, code: str) -> None:
    status, text = wordless.post(f"/v1/{route}", {"model": wordless.model, "max_tokens": 2} | body)
    assert status == 400, text
    assert json.loads(text)["error"]["code"] == code
    assert answer(wordless, [1], 1)


def test_a_quantised_checkpoint_computes_what_its_file_says(directory: Path) -> None:
    """Weights in 8 bits. Its fingerprint is the float model's; the engine's numbers are the quantised model's."""
    floats = write_random(directory / "floats")
    target = write_quantised(floats, directory / "eight-bits", "int8")
    fingerprint.record(module(floats), target)
    server = Server(target, directory / "eight-bits-logs", *SMALL_CACHE)
    try:
        server.wait_ready()
        assert "quantised: " in server.log
        reference = quantised(module(floats), "int8")
        ids = probe_ids(100, VOCABULARY)
        choice = answer(server, ids, 1)
        far = differences(reference, ids, choice)
        whole = torch.tensor([ids + choice["token_ids"]])
        with torch.no_grad():
            plain = module(floats)(whole, use_cache=False).logits[0].log_softmax(-1)[:-1]
        scores = plain.gather(1, whole[0, 1:, None])[:, 0]
        rounding = (torch.tensor(choice["logprobs"]["token_logprobs"][1:]) - scores).abs().mean()
        assert far.mean() < rounding / 4
    finally:
        server.stop()


@pytest.mark.slow
def test_tensor_parallel_ranks_compute_the_same_and_die_with_their_server(directory: Path, base: Path) -> None:
    server = Server(base, directory / "ranks", *SMALL_CACHE, "--tp", "2")
    try:
        server.wait_ready()
        reference = module(base)
        for length in (1, 130, 300):
            ids = probe_ids(length, VOCABULARY)
            assert differences(reference, ids, answer(server, ids, 4)).max() < TOLERANCE
        left = server.descendants()
        assert len(named(left, "Worker")) == 2, [" ".join(process.cmdline()) for process in left]
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        _, alive = psutil.wait_procs(left, timeout=10)
        assert not alive
    finally:
        server.stop()


@pytest.mark.slow
def test_pipeline_stages_compute_the_same(directory: Path, base: Path) -> None:
    server = Server(base, directory / "stages", *SMALL_CACHE, "--pp", "2")
    try:
        server.wait_ready()
        ids = probe_ids(130, VOCABULARY)
        assert differences(module(base), ids, answer(server, ids, 8)).max() < TOLERANCE
    finally:
        server.stop()


def test_a_model_that_is_not_causal_says_what_it_costs(directory: Path) -> None:
    target = write_random(directory / "both-ways", "gpt", causal=False)
    server = Server(target, directory / "both-ways-logs", *SMALL_CACHE)
    try:
        server.wait_ready()
        assert (
            f"not causal: every new token computes its whole sequence again (up to {POSITIONS} positions)" in server.log
        )
        reference, ids = module(target), probe_ids(40, 256)
        chosen = answer(server, ids, 6)["token_ids"]
        for token in chosen:
            with torch.no_grad():
                assert token == int(reference(torch.tensor([ids])).logits[0, -1].argmax())
            ids = [*ids, token]
    finally:
        server.stop()


@pytest.mark.slow
def test_a_model_drafts_for_itself_over_a_cache_of_latents(directory: Path) -> None:
    """Multi-token prediction changes no token; the report has the size of the cache; repeated prompts come from it."""
    target = write_random(directory / "latents", "medassist_deepseek")
    server = Server(target, directory / "latents-logs", *SMALL_CACHE, "--speculative", "mtp")
    try:
        server.wait_ready()
        reference = module(target)
        config = reference.config
        layer = (config.kv_lora_rank + config.qk_rope_head_dim) * 4  # bytes a token, in float32
        size = f"{config.num_hidden_layers * layer:,} bytes a token and {layer:,} for drafting"
        assert re.search(rf"KV cache for [\d,]+ tokens, {size}\n", server.log), server.log
        for length in (1, 64, 130, 470):
            ids = probe_ids(length, VOCABULARY)
            assert differences(reference, ids, answer(server, ids, 40)).max() < TOLERANCE
        assert server.engine_metric("spec_decode_num_draft_tokens_total") > 0
        # Scores of a prompt are always computed; without them it may come from the cache.
        body = {"model": server.model, "prompt": probe_ids(470, VOCABULARY), "max_tokens": 8, "temperature": 0,
                "ignore_eos": True, "return_token_ids": True}  # fmt: skip
        answers = []
        for _ in range(2):
            before = server.engine_metric("prefix_cache_hits_total")
            status, text = server.post("/v1/completions", body)
            assert status == 200, text
            answers.append(json.loads(text)["choices"][0]["token_ids"])
        assert server.engine_metric("prefix_cache_hits_total") - before >= 256
        assert answers[0] == answers[1] == answer(server, body["prompt"], 8)["token_ids"]
    finally:
        server.stop()
