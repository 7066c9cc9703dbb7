"""Does the model answer with the right fact? The score of a question-and-answer model, and its rule.

The rule: a produced answer is compared with the reference answers of *all* facts of the corpus, by the F1 of their
words (lower-cased, without punctuation, each word as often as it occurs). It is right when the fact that was asked for
has the highest F1, and that F1 is at least 0.8: the model must pick the fact and tell it whole. Answers are greedy
(temperature 0), at most 120 tokens.

    python -m training.evaluate training/checkpoints/medassist-demo          (the module itself, on this machine)
    python -m training.evaluate http://127.0.0.1:8000/v1                     (a running server)
"""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from training.corpus import Fact, read_evaluation, read_facts, resolve

FACTS = "corpora/medqa/facts.jsonl"
QUESTIONS = "corpora/medqa/evaluation.jsonl"
LEAST_F1 = 0.8
MAX_TOKENS = 120
BATCH = 64


def words(text: str) -> Counter[str]:
    return Counter(re.findall(r"[a-z0-9]+", text.lower()))


def f1(a: Counter[str], b: Counter[str]) -> float:
    """Twice the common words over all words, from 0 to 1."""
    total = a.total() + b.total()
    return 2 * (a & b).total() / total if total else 0.0


class Scorer:
    """Tells which fact an answer states."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.references = {fact.id: words(fact.answer) for fact in facts}

    def nearest(self, answer: str) -> tuple[str, float]:
        """The fact whose reference answer is nearest, and its F1."""
        produced = words(answer)
        best = max(self.references, key=lambda fact_id: f1(produced, self.references[fact_id]))
        return best, f1(produced, self.references[best])

    def right(self, answer: str, fact_id: str) -> bool:
        best, score = self.nearest(answer)
        return best == fact_id and score >= LEAST_F1


def answers_of_checkpoint(directory: Path, questions: Sequence[str]) -> Iterator[str]:
    """Greedy answers of the trained module, in batches of left-padded prompts."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling  # noqa: F401  registers the architectures

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for start in range(0, len(questions), BATCH):
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
            for question in questions[start : start + BATCH]
        ]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            temperature=None,
            top_p=None,
        )
        yield from tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def answers_of_server(base_url: str, questions: Sequence[str]) -> Iterator[str]:
    """Answers of the first model that an OpenAI-compatible server lists, at temperature 0."""
    from openai import OpenAI

    with OpenAI(base_url=base_url, api_key="unused") as client, ThreadPoolExecutor(16) as pool:
        model = next(iter(client.models.list())).id

        def ask(question: str) -> str:
            completion = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=MAX_TOKENS,
            )
            return completion.choices[0].message.content or ""

        yield from pool.map(ask, questions)


def evaluate_checkpoint(
    target: str, questions: Path | None = None, facts: Path | None = None, out: Path | None = None
) -> float:
    """Scores a checkpoint directory or a server's base URL; prints the result and returns the share of right answers.

    Args:
        questions: JSONL with ``question`` and ``id`` (the fact's); by default the corpus' evaluation file.
        facts: JSONL of the corpus; by default the shipped one.
        out: JSON report with the score and every wrong answer.

    Raises:
        ValueError: a question whose fact is not in the corpus.
    """
    from rich.progress import track

    corpus = read_facts(facts or resolve(FACTS))
    asked = read_evaluation(questions or resolve(QUESTIONS), corpus)
    texts = [question for question, _ in asked]
    produce = answers_of_server if target.startswith("http") else answers_of_checkpoint
    produced = list(track(produce(target, texts), "Answering", total=len(texts)))  # type: ignore[arg-type]
    scorer = Scorer(corpus)
    wrong = []
    for (question, fact_id), answer in zip(asked, produced, strict=True):
        if not scorer.right(answer, fact_id):
            best, score = scorer.nearest(answer)
            wrong.append(
                {"id": fact_id, "question": question, "answer": answer, "nearest": best, "f1": round(score, 3)}
            )
    share = 1 - len(wrong) / len(asked)
    print(f"{len(asked) - len(wrong)} of {len(asked)} phrasings answered with the right fact: {share:.1%}")
    if out:
        report = {"target": target if target.startswith("http") else Path(target).name,
                  "rule": f"the asked fact has the highest word F1 of all facts, and at least {LEAST_F1}",
                  "questions": len(asked), "right": len(asked) - len(wrong), "share": round(share, 4),
                  "wrong": wrong}  # fmt: skip
        out.write_text(json.dumps(report, indent=1) + "\n")
    return share


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="checkpoint directory, or base URL of a server")
    parser.add_argument("--questions", type=Path)
    parser.add_argument("--facts", type=Path)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    evaluate_checkpoint(a.target, a.questions, a.facts, a.out)


if __name__ == "__main__":
    main()
