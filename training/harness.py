"""lm-evaluation-harness on local files: the same tasks and numbers for a checkpoint's module and a served endpoint.

Nothing is fetched and nothing of a row's text is logged or reported: a report has numbers, and the checksum of the
file that they were computed from. Tasks are those of ``training/tasks/`` and any task file of the harness' own format.
"""

import contextlib
import gzip
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata, resources
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate as run_tasks
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from training.harness_models import Endpoint, Module

SEED = 1234
BOOTSTRAPS = 1000  # of metrics that have no formula for their standard error
DECISIONS = ("yes", "no", "maybe")
PERPLEXITIES = ("word_perplexity", "byte_perplexity", "bits_per_byte")

Row = dict[str, Any]


def pubmedqa_row(row: Row) -> Row:
    question, contexts = row.get("question"), row.get("contexts")
    if not isinstance(question, str) or not _texts(contexts) or row.get("decision") not in DECISIONS:
        raise ValueError('needs "question" (text), "contexts" (list of texts) and "decision" (yes, no or maybe)')
    return {"question": question, "contexts": contexts, "decision": row["decision"]}


def choices_row(row: Row) -> Row:
    question, choices, answer = row.get("question"), row.get("choices"), row.get("answer")
    right = _texts(choices) and len(choices) > 1 and type(answer) is int and 0 <= answer < len(choices)  # type: ignore[arg-type]
    if not isinstance(question, str) or not right:
        raise ValueError('needs "question" (text), "choices" (two texts or more) and "answer" (index of the right one)')
    return {"question": question, "choices": choices, "answer": answer}


def perplexity_row(row: Row, column: str = "text") -> Row:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'needs "{column}" (text that is not blank); --column names another')
    return {"text": text}


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v.strip() for v in value)


BUILT_IN: dict[str, Callable[..., Row]] = {
    "pubmedqa": pubmedqa_row,
    "choices": choices_row,
    "perplexity": perplexity_row,
}


def read_rows(path: Path, check: Callable[[Row], Row], limit: int | None = None) -> list[Row]:
    """The first ``limit`` rows of a JSONL file, gzipped where its name ends in ``.gz``; blank lines do not count.

    Raises:
        ValueError: a line that is no JSON object, or that ``check`` refuses, by its number; no rows.
    """
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as f:
        try:
            for number, line in islice(((n, line) for n, line in enumerate(f, 1) if line.strip()), limit):
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("is no JSON object")
                    rows.append(check(row))
                except json.JSONDecodeError as e:
                    raise ValueError(f"{path}, line {number}: is no JSON: {e.msg}") from None
                except ValueError as e:
                    raise ValueError(f"{path}, line {number}: {e}") from None
        except (EOFError, UnicodeDecodeError) as e:
            raise ValueError(f"{path}: {e}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def load_task(
    name: str, data: Path | None, limit: int | None = None, column: str = "text", seed: int = SEED
) -> list[ConfigurableTask]:
    """The task of that name, or those of a task file. ``data`` takes the place of a task file's own data set.

    Raises:
        ValueError: no such task, no data, or a task that the harness cannot load.
    """
    if name in BUILT_IN:
        if data is None:
            raise ValueError(f"the task {name} needs its rows: set --data FILE.jsonl")
        check = BUILT_IN[name] if name != "perplexity" else lambda row: perplexity_row(row, column)
        path = Path(str(resources.files("training").joinpath(f"tasks/{name}.yaml")))
    else:
        check, path = dict, Path(name)
        if not path.is_file():
            raise ValueError(f"--tasks {name}: neither one of {', '.join(BUILT_IN)} nor a task file (YAML)")
    rows = read_rows(data, check, limit) if data else None
    try:
        if rows is None:
            tasks = list(TaskManager(include_defaults=False).load([str(path)])["tasks"].values())
        else:
            dataset = datasets.Dataset.from_list(rows)
            own = dict.fromkeys(("dataset_path", "dataset_name", "dataset_kwargs", "training_split", "validation_split",
                                 "fewshot_split"))  # fmt: skip
            config = load_yaml(path) | own | {"test_split": "test", "custom_dataset": lambda **_: {"test": dataset}}
            tasks = [ConfigurableTask(config=config)]
    except Exception as e:  # of whatever kind: a task file can hold any mistake, and code
        hint = "" if data else " (without --data it must name its own data set)"
        raise ValueError(f"--tasks {name}: lm-evaluation-harness cannot load it{hint}: {e}") from e
    for task in tasks:
        if task.config.num_fewshot is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed)
    return tasks


def evaluate(model: Module | Endpoint, tasks: Sequence[ConfigurableTask], limit: int | None = None) -> Row:
    """Results by task: ``rows``, ``metrics`` with ``value`` and ``stderr`` (None where it has none), ``truncated``
    (rows that lost context), ``commonest`` (accuracy of always giving the commonest answer, for choices), and
    ``per_row`` with the log-likelihoods, of each choice or of the text.
    """
    with _quiet():
        outcome = run_tasks(
            model, {"tasks": {task.task_name: task for task in tasks}}, limit=limit, bootstrap_iters=BOOTSTRAPS
        )
    assert outcome is not None, "this is the only process"
    results = {}
    for task in tasks:
        samples = outcome["samples"][task.task_name]
        scores = outcome["results"][task.task_name]
        metrics = {}
        for key, value in scores.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = scores.get(f"{metric}_stderr,{filter_name}")
            if metric in PERPLEXITIES:
                stderr = ratio_stderr(metric, [sample[metric] for sample in samples])
            label = metric if filter_name == "none" else key
            metrics[label] = {"value": float(value), "stderr": _finite(stderr)}
        first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        result = {"rows": len(first), "metrics": metrics, "truncated": len(model.truncated[task.task_name])}
        if task.OUTPUT_TYPE == "multiple_choice":
            result["commonest"] = max(Counter(str(sample["target"]) for sample in first).values()) / len(first)
        results[task.task_name] = result | {"per_row": [_numbers(sample) for sample in first]}
    return results


def _numbers(sample: Row) -> Row:
    """Of a row: log-likelihoods; nothing of a text that was generated."""
    responses = [r[0] if isinstance(r, tuple | list) else r for r in sample["filtered_resps"]]
    return {"row": sample["doc_id"] + 1, "log_likelihoods": [float(r) for r in responses if isinstance(r, float)]}


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def ratio_stderr(metric: str, pairs: Sequence[tuple[float, int]]) -> float | None:
    """Standard error of a perplexity or of bits per byte, from each row's log-likelihood and its words or bytes.

    ``r = -sum(l) / sum(n)`` has the standard error ``sqrt(m / (m - 1) * sum((-l - r n)**2)) / sum(n)`` over m rows
    (Taylor linearisation of a ratio), and ``exp(r)`` that times ``exp(r)``.
    """
    m, units = len(pairs), sum(n for _, n in pairs)
    if m < 2:
        return None
    r = -sum(score for score, _ in pairs) / units
    stderr = math.sqrt(m / (m - 1) * sum((-score - r * n) ** 2 for score, n in pairs)) / units
    return stderr / math.log(2) if metric == "bits_per_byte" else stderr * math.exp(r)


def macro_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Mean of the F1 of every answer that is right or was given; ``pairs`` are the right and the given one of a row."""
    right, given = (Counter(int(pair[i]) for pair in pairs) for i in (0, 1))
    both = Counter(int(a) for a, b in pairs if a == b)
    answers = right.keys() | given.keys()
    return sum(2 * both[a] / (right[a] + given[a]) for a in answers) / len(answers)


def report(
    target: str,
    names: Sequence[str],
    data: Path | None = None,
    *,
    limit: int | None = None,
    column: str = "text",
    tokenizer: Path | None = None,
    key: str | None = None,
    served: str | None = None,
    window: int | None = None,
    batch_size: int = 8,
    seed: int = SEED,
) -> Row:
    """Evaluates a checkpoint directory, or an endpoint by its base URL, on tasks.

    Args:
        names: built-in tasks or paths of task files; all read ``data``.
        data: JSONL, gzipped or not.
        limit: first rows that are taken; all if None.
        column: of the text, for the task perplexity.
        tokenizer: directory; needed for an endpoint, the checkpoint's own otherwise.
        key: of the endpoint.
        served: model of the endpoint.
        window: tokens; the model's if None.
        batch_size: sequences at a time.
        seed: of few-shot examples.

    Raises:
        ValueError: a target, task, file or setting that is wrong.
        openai.APIError, aiohttp.ClientError: the endpoint failed.
    """
    is_url = target.startswith(("http://", "https://"))
    if is_url and tokenizer is None:
        raise ValueError(
            f"{target} is asked by token ids, and tells no tokenizer: give the served checkpoint's directory as "
            "--tokenizer"
        )
    with _quiet():
        tasks = [task for name in names for task in load_task(name, data, limit, column, seed)]
        if len({task.task_name for task in tasks}) < len(tasks):
            raise ValueError("--tasks names a task twice")
        model: Module | Endpoint
        if is_url:
            assert tokenizer is not None
            model = Endpoint(target, tokenizer, key, served, window, batch_size, seed)
        else:
            model = Module(Path(target), tokenizer or Path(target), window, batch_size)
    try:
        results = evaluate(model, tasks, limit)
    except RuntimeError as e:
        if "out of memory" not in str(e):
            raise
        raise ValueError(f"out of memory: set --batch-size below {batch_size}, or --window") from e
    summary: Row = {
        "target": target if is_url else Path(target).name,
        "through": "endpoint" if is_url else "module, float32",
        "window": model.window,
        "limit": limit,
        "seed": seed,
        "versions": {name: metadata.version(name) for name in ("medassist", "lm_eval", "torch", "transformers")},
    }
    if isinstance(model, Endpoint):
        summary["model"] = model.served
    if data:
        with data.open("rb") as f:
            summary["data"] = {"file": data.name, "sha256": hashlib.file_digest(f, "sha256").hexdigest()}
    return summary | {"tasks": results}


def table(summary: Row) -> list[str]:
    """Lines of a terminal: each metric with its standard error, and what else to know of each task."""
    rows = [("task", "metric", "value", "stderr", "rows")]
    notes = []
    for name, result in summary["tasks"].items():
        for metric, score in result["metrics"].items():
            stderr = "-" if score["stderr"] is None else _figure(score["stderr"])
            rows.append((name, metric, _figure(score["value"]), stderr, f"{result['rows']:,}"))
        if "commonest" in result:
            notes.append(f"{name}: always giving the commonest answer has acc {result['commonest']:.4f}")
        if result["truncated"]:
            notes.append(
                f"warning: {name}: {result['truncated']:,} of {result['rows']:,} rows are longer than the window of "
                f"{summary['window']:,} tokens and lost the beginning of their context"
            )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells))
    return lines + notes


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4e}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness' log: it has rows and answers in it, and a page of what concerns its own command."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(before)
