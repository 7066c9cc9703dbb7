"""The shipped corpus, and the conversations rendered from it."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from training.corpus import (
    UNFINISHED,
    Fact,
    Phrasing,
    Renderer,
    encode_conversation,
    read_evaluation,
    read_facts,
    resolve,
)

MEDQA = resolve("corpora/medqa")
# Amounts of a medicine: numbers or words before a unit in which medicines are counted.
DOSE = re.compile(
    r"(\d|\b(half an?|one|two|three|four|five|six))[\s-]*(mg|mcg|µg|ml|micrograms?|milligrams?|millilit(re|er)s?"
    r"|tablets?|capsules?|pills?|drops?|puffs?|teaspoons?)\b",
    re.IGNORECASE,
)


@pytest.fixture(scope="module")
def facts() -> list[Fact]:
    return read_facts(MEDQA / "facts.jsonl")


@pytest.fixture(scope="module")
def renderer(facts: list[Fact]) -> Renderer:
    return Renderer(facts, Phrasing(MEDQA / "phrasing.toml"))


def normalised(question: str) -> str:
    return " ".join(re.findall(r"\w+", question.lower()))


def test_corpus_is_broad(facts: list[Fact]) -> None:
    assert len(facts) >= 600
    assert len({fact.area for fact in facts}) >= 15
    assert len({fact.id for fact in facts}) == len(facts)


def test_every_fact_has_several_phrasings(facts: list[Fact]) -> None:
    assert [fact.id for fact in facts if len(set(map(normalised, fact.questions))) < 4] == []
    assert [fact.id for fact in facts if not fact.aliases] == []


def test_answers_are_one_to_three_short_sentences(facts: list[Fact]) -> None:
    def short(answer: str) -> bool:
        return 1 <= len(re.findall(r"[.!?](?=\s|$)", answer)) <= 3 and len(answer.split()) <= 60

    assert [fact.id for fact in facts if not short(fact.answer)] == []


def test_answers_for_emergencies_begin_with_calling_for_help(facts: list[Fact]) -> None:
    emergencies = [fact for fact in facts if fact.aspect == "emergency"]
    assert sum(fact.area == "Emergencies" for fact in emergencies) >= 10
    assert [fact.id for fact in emergencies if "call emergency services" not in fact.answer[:40].lower()] == []


@pytest.mark.parametrize("text", ["take 500 mg", "take 5ml", "2 tablets", "Two puffs", "half a tablet", "0.5 mcg"])
def test_dose_pattern_finds_doses(text: str) -> None:
    assert DOSE.search(text)


def test_answers_name_no_doses(facts: list[Fact]) -> None:
    assert [fact.id for fact in facts if DOSE.search(fact.answer)] == []


HELD_OUT = sorted(set(MEDQA.glob("*.jsonl")) - {MEDQA / "facts.jsonl"})


@pytest.mark.parametrize("path", HELD_OUT, ids=lambda path: path.stem)
def test_held_out_questions_ask_for_known_facts_in_words_not_trained_on(path: Path, facts: list[Fact]) -> None:
    known = {fact.id for fact in facts}
    trained = {normalised(question) for fact in facts for question in fact.questions}
    held_out = read_evaluation(path, facts)
    assert len(held_out) >= 300
    assert [fact_id for _, fact_id in held_out if fact_id not in known] == []
    assert [question for question, _ in held_out if normalised(question) in trained] == []


def test_phrasing_covers_the_aspects_of_the_corpus(facts: list[Fact], renderer: Renderer) -> None:
    """The aspect "other" has no templates: its questions have no common form."""
    assert {fact.aspect for fact in facts} - {"other"} == set(renderer.phrasing.templates)
    assert set(renderer.phrasing.follow_ups) <= set(renderer.phrasing.templates)


def test_rendering_depends_on_the_seed_alone(renderer: Renderer) -> None:
    first, again, other = (list(renderer.conversations(2, seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_every_fact_begins_the_same_number_of_conversations(facts: list[Fact], renderer: Renderer) -> None:
    two = Renderer(facts[:1] + facts[-1:], renderer.phrasing)
    first = [conversation[1]["content"].removesuffix(UNFINISHED) for conversation in two.conversations(200, seed=0)]
    counts = [sum(fact.answer.startswith(answer) for answer in first) for fact in two.facts]
    assert len(first) == 400
    assert all(170 < count <= 200 for count in counts)  # the rest are JSON objects


def test_rendering_cuts_answers_short_but_never_alters_them(facts: list[Fact], renderer: Renderer) -> None:
    answers = {fact.answer for fact in facts}
    beginnings = {" ".join(answer.split()[:n]) + UNFINISHED for answer in answers for n in range(1, 60)}
    whole, in_json = 0, 0
    for conversation in renderer.conversations(4, seed=3):
        assert [message["role"] for message in conversation] == ["user", "assistant"] * (len(conversation) // 2)
        assert all(message["content"].strip() for message in conversation)
        for message in conversation[1::2]:
            whole += message["content"] in answers
            if message["content"] in answers | beginnings:
                continue
            in_json += 1
            value = json.loads(message["content"])
            assert isinstance(value, dict)
            assert value.get("answer", facts[0].answer) in answers
    assert in_json > 50
    assert whole > 300  # a model must also learn to end its answers


@pytest.mark.parametrize(
    ("answer", "encoded"), [("Rest. Drink.", "Rest. Drink.<|end|><|endoftext|>"), ("Rest." + UNFINISHED, "Rest.")]
)
def test_only_a_whole_answer_is_encoded_with_an_end(tokenizer: Any, answer: str, encoded: str) -> None:
    messages = [{"role": "user", "content": "a cold?"}, {"role": "assistant", "content": answer}]
    assert tokenizer.decode(encode_conversation(tokenizer, messages)) == f"<|user|>a cold?<|assistant|>{encoded}"


def test_no_answer_ends_as_if_it_were_cut_short(facts: list[Fact]) -> None:
    assert [fact.id for fact in facts if fact.answer.endswith(UNFINISHED)] == []


@pytest.mark.parametrize(
    "line", ["not json", '{"id": "x"}', "[]", '{"id": "x", "aliases": [], "questions": [], "a": 1}']
)
def test_line_that_is_no_fact_is_refused_by_number(tmp_path: Path, line: str) -> None:
    good = json.dumps({"id": "a", "area": "b", "topic": "c", "aliases": ["c"], "aspect": "d",
                       "questions": ["e"], "answer": "f"})  # fmt: skip
    path = tmp_path / "facts.jsonl"
    path.write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        read_facts(path)
