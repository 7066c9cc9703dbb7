"""A corpus of six facts."""

import json
from pathlib import Path

from training.recipe import Corpus

PHRASING = """
[templates]
shape = ["which shape has {t}", "{t} shape"]
[follow_ups]
shape = ["and its shape?"]
[noise]
openings = ["well, "]
closings = [" please"]
stop_words = ["the", "is"]
[synonyms]
sets = [["colour", "hue"], ["big", "large"]]
"""


def write_corpus(folder: Path) -> Corpus:
    folder.mkdir()
    facts, held_out = [], []
    for topic, colour, shape in (
        ("the sun", "yellow", "round"),
        ("a leaf", "green", "flat"),
        ("a brick", "red", "long"),
    ):
        for aspect, answer in (("colour", f"It is {colour}."), ("shape", f"It is {shape}.")):
            fact = {"id": f"{topic}.{aspect}", "area": "Things", "topic": topic, "aliases": [topic], "aspect": aspect,
                    "questions": [f"What {aspect} is {topic}?", f"Tell me the {aspect} of {topic}."],
                    "answer": answer}  # fmt: skip
            facts.append(fact)
            held_out.append({"id": fact["id"], "question": f"{topic}, its {aspect}?"})
    for name, rows in (("facts", facts), ("evaluation", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "phrasing.toml").write_text(PHRASING)
    return Corpus(facts=str(folder / "facts.jsonl"), evaluation=str(folder / "evaluation.jsonl"), renders=8)
