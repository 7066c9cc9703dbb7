"""lm-evaluation-harness as it comes, straight at the engine and through the gateway: the same numbers, to the bit."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import pytest
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from tests.e2e.server import CHECKPOINT, Server
from training import harness

pytestmark = pytest.mark.engine

TOPICS = ("asthma", "a stroke", "high blood pressure", "kidney stones", "a fever", "migraine", "diabetes", "an ulcer")
WINDOW = 512


@contextmanager
def port_of(path: str) -> Iterator[int]:
    """A port of this machine that leads to a Unix socket: the harness takes no other address of an engine."""

    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:  # the other direction has closed them
            pass

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            engine = socket.socket(socket.AF_UNIX)
            engine.connect(path)
            ends.extend((client, engine))
            for pair in ((client, engine), (engine, client)):
                threading.Thread(target=copy, args=pair, daemon=True).start()

    ends: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
    for end in ends:
        end.close()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ConfigurableTask]:
    """A choice among answers, the perplexity of text, and answers that are written."""
    questions = [f"What are the symptoms of {topic}?" for topic in TOPICS]
    rows = [
        {"question": question, "contexts": [f"Patients with {topic} were seen {n} times." for n in range(9)],
         "decision": ("yes", "no", "maybe")[i % 3], "text": f"{question} Doctors ask about {topic} first."}
        for i, (topic, question) in enumerate(zip(TOPICS, questions, strict=True))
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("lm-eval") / "rows.jsonl"
    datasets.Dataset.from_list(rows).to_json(path)
    written = {
        "task": "written",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{text}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 24},
        "metric_list": [{"metric": "bleu"}],
        "num_fewshot": 0,
    }
    built_in = [task for name in ("pubmedqa", "perplexity") for task in harness.load_task(name, path)]
    return {task.config.task: task for task in [*built_in, ConfigurableTask(config=written)]}


def results(base_url: str, model: str, tasks: dict[str, ConfigurableTask]) -> tuple[Any, Any]:
    """Scores, and of each row what the server answered: log-likelihoods or text."""
    # One request at a time: an engine's sums depend, in their last bit, on what it computes beside them.
    lm = get_model("local-completions")(
        base_url=f"{base_url}/completions", model=model, tokenizer=str(CHECKPOINT), tokenizer_backend="huggingface",
        max_length=WINDOW, num_concurrent=1,
    )  # fmt: skip
    outcome = evaluate(lm, {"tasks": tasks}, bootstrap_iters=0)
    assert outcome is not None
    answers = {
        name: [(sample["doc_id"], sample["resps"]) for sample in samples]
        for name, samples in outcome["samples"].items()
    }
    return outcome["results"], answers


def test_the_same_scores_and_log_likelihoods_with_and_without_the_gateway(
    server: Server, tasks: dict[str, ConfigurableTask]
) -> None:
    before = server.engine_metric("request_success_total")
    with port_of(str(server.engine["socket"])) as port:
        scores, answers = results(f"http://127.0.0.1:{port}/v1", server.model, tasks)
    between = server.engine_metric("request_success_total")
    through = results(server.base_url, server.model, tasks)
    assert through == (scores, answers)
    # As many requests reached the engine both ways, and the numbers are numbers.
    assert server.engine_metric("request_success_total") - between == between - before > 4 * len(TOPICS)
    assert set(answers) == {"pubmedqa", "perplexity", "written"}
    assert scores["perplexity"]["byte_perplexity,none"] > 1
    assert all(len(rows) == len(TOPICS) for rows in answers.values())
    assert len({str(row) for row in answers["written"]}) == len(TOPICS)
