"""A question-and-answer corpus, and the training conversations rendered from it.

A fact is one JSON line: ``id``, ``area``, ``topic``, ``aliases`` (noun phrases for the topic), ``aspect`` (a kind of
question, such as symptoms), ``questions`` (phrasings) and ``answer``. A few hundred facts with a dozen phrasings each
are too little for a model to learn what *any* phrasing asks, so each fact is rendered many times: a written phrasing
or one of its aspect's templates, with aliases and synonyms exchanged, openings added, capitals, punctuation and letters
lost as people lose them when they type. Answers are never changed.

Rendering is a pure function of the corpus and the seed.
"""

import json
import random
import re
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
UNFINISHED = "\x00"  # ends an answer that is cut short; not encoded
Message = dict[str, str]


@dataclass(frozen=True)
class Fact:
    id: str
    area: str
    topic: str
    aliases: tuple[str, ...]
    aspect: str
    questions: tuple[str, ...]
    answer: str


def resolve(path: str) -> Path:
    """A path of a recipe: absolute, or relative to the package ``training``."""
    return Path(path) if Path(path).is_absolute() else PACKAGE / path


def read_facts(path: Path) -> list[Fact]:
    """Reads a corpus.

    Raises:
        ValueError: a line that is not a fact; the message names the line.
    """
    facts = []
    for number, line in enumerate(path.read_text().rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            row["aliases"], row["questions"] = tuple(row["aliases"]), tuple(row["questions"])
            facts.append(Fact(**row))
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}, line {number}: not a fact ({e})") from e
    if repeated := [fact_id for fact_id, n in Counter(fact.id for fact in facts).items() if n > 1]:
        raise ValueError(f"{path}: the id {repeated[0]!r} occurs twice")
    return facts


def read_evaluation(path: Path, facts: list[Fact]) -> list[tuple[str, str]]:
    """Held-out phrasings, as ``(question, fact id)``; one JSON line each.

    Raises:
        ValueError: a line that is not one, or asks for a fact that the corpus lacks; the message names the line.
    """
    known, rows = {fact.id for fact in facts}, []
    for number, line in enumerate(path.read_text().rstrip("\n").split("\n"), 1):
        try:
            row = json.loads(line)
            rows.append((row["question"], row["id"]))
        except (ValueError, KeyError, TypeError) as e:
            raise ValueError(f"{path}, line {number}: not a question ({e!r})") from e
        if row["id"] not in known:
            raise ValueError(f"{path}, line {number}: the corpus has no fact {row['id']!r}")
    return rows


class Phrasing:
    """The wording by which questions are varied; read from a TOML file."""

    def __init__(self, path: Path) -> None:
        words = tomllib.loads(path.read_text())
        self.templates: dict[str, list[str]] = words["templates"]
        self.follow_ups: dict[str, list[str]] = words["follow_ups"]
        self.openings: list[str] = words["noise"]["openings"]
        self.closings: list[str] = words["noise"]["closings"]
        self.stop_words = set(words["noise"]["stop_words"])
        self.synonyms = {word: [w for w in group if w != word] for group in words["synonyms"]["sets"] for word in group}
        longest_first = sorted(self.synonyms, key=len, reverse=True)
        self._synonym = re.compile(r"\b(" + "|".join(map(re.escape, longest_first)) + r")\b", re.IGNORECASE)

    def vary(self, question: str, aliases: tuple[str, ...], rng: random.Random) -> str:
        """One way in which somebody else might have typed the question."""
        if len(aliases) > 1 and rng.random() < 0.3:
            question = _exchange_alias(question, aliases, rng)
        if self.synonyms and rng.random() < 0.35:
            question = self._synonym.sub(
                lambda m: rng.choice(self.synonyms[m[1].lower()]) if rng.random() < 0.5 else m[0], question
            )
        if rng.random() < 0.15:
            question = rng.choice(self.openings) + question[0].lower() + question[1:]
        if rng.random() < 0.05:
            question = question.rstrip("?. ") + rng.choice(self.closings)
        if rng.random() < 0.2:
            words = question.split()
            kept = [w for w in words if w.lower() not in self.stop_words or rng.random() > 0.4]
            question = " ".join(kept if len(kept) > 1 else words)
        if rng.random() < 0.15:
            # Words go missing, so that no single one of a phrasing can be relied on.
            words = question.split()
            lost = rng.uniform(0, 0.35)
            kept = [w for w in words if rng.random() > lost]
            question = " ".join(kept if len(kept) > 1 else words)
        if rng.random() < 0.03:
            words = question.split()
            at = rng.randrange(len(words))
            question = " ".join(words[at:] + words[:at])
        if rng.random() < 0.08:
            question = _mistype(question, rng)
        return _punctuate(question, rng)


def _exchange_alias(question: str, aliases: tuple[str, ...], rng: random.Random) -> str:
    for alias in sorted(aliases, key=len, reverse=True):
        pattern = re.compile(rf"\b{re.escape(alias)}\b", re.IGNORECASE)
        if pattern.search(question):
            other = rng.choice([a for a in aliases if a != alias])
            before, after = pattern.split(question, maxsplit=1)
            return before + other + after
    return question


def _mistype(question: str, rng: random.Random) -> str:
    """Drops, doubles or swaps one letter of a long word."""
    words = question.split()
    long_words = [i for i, word in enumerate(words) if len(word) > 4]
    if not long_words:
        return question
    i = rng.choice(long_words)
    word = words[i]
    at = rng.randrange(1, len(word) - 1)
    words[i] = rng.choice(
        (
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
        )
    )
    return " ".join(words)


def _punctuate(question: str, rng: random.Random) -> str:
    style = rng.random()
    if style < 0.35:
        question = question[0].upper() + question[1:].rstrip("?.") + "?"
    elif style < 0.5:
        question = question.rstrip("?.")
    elif style < 0.7:
        question = question.lower().rstrip("?.").replace("'", "")
    elif style < 0.8:
        question = question.lower()
    return question


class Renderer:
    """Makes training conversations from facts.

    Most have one turn; some go on about the same topic with "how is it treated?", some move to another topic, and a few
    ask for the answer as a JSON object, which teaches even a tiny model to close its strings.
    """

    def __init__(self, facts: list[Fact], phrasing: Phrasing) -> None:
        self.facts, self.phrasing = facts, phrasing
        self.decisive_words = _decisive_words(facts)
        self.of_topic: dict[str, list[Fact]] = defaultdict(list)
        for fact in facts:
            self.of_topic[fact.topic].append(fact)

    def conversations(self, renders: int, seed: int) -> Iterator[list[Message]]:
        """``renders`` conversations that begin with each fact, in one shuffled order."""
        rng = random.Random(seed)
        order = [fact for fact in self.facts for _ in range(renders)]
        rng.shuffle(order)
        for fact in order:
            yield self._conversation(fact, rng)

    def question(self, fact: Fact, rng: random.Random) -> str:
        templates = self.phrasing.templates.get(fact.aspect)
        if templates and rng.random() < 0.25:
            question = rng.choice(templates).format(t=rng.choice(fact.aliases))
        else:
            question = rng.choice(fact.questions)
            if rng.random() < 0.05:  # half of one phrasing and half of another
                first, second = question.split(), rng.choice(fact.questions).split()
                question = " ".join(first[: len(first) // 2 + 1] + second[len(second) // 2 :])
        return self.phrasing.vary(question, fact.aliases, rng)

    def _conversation(self, fact: Fact, rng: random.Random) -> list[Message]:
        kind = rng.random()
        if kind < 0.03:
            return self._json_turn(fact, rng)
        if kind < 0.86:
            # The words that decide which fact it is. The rest of an answer is soon known by heart; leaving it out
            # lets a run of the same length see several times as many questions.
            words = fact.answer.split()[: self.decisive_words[fact.id] + rng.randint(0, 2)]
            return _turn(self.question(fact, rng), " ".join(words) + UNFINISHED)
        messages = _turn(self.question(fact, rng), fact.answer)
        others = [
            f for f in self.of_topic[fact.topic] if f.aspect != fact.aspect and f.aspect in self.phrasing.follow_ups
        ]
        if kind < 0.895 and others:
            other = rng.choice(others)
            question = rng.choice(self.phrasing.follow_ups[other.aspect])
            messages += _turn(_punctuate(question, rng), other.answer)
        elif kind < 0.925:
            other = rng.choice(self.facts)
            messages += _turn(self.question(other, rng), other.answer)
        return messages

    def _json_turn(self, fact: Fact, rng: random.Random) -> list[Message]:
        question = self.question(fact, rng)
        wish = rng.choice(
            ("Answer in JSON: ", "Reply as a JSON object. ", "JSON please: ", "Return JSON. ", "In JSON, ")
        )
        return _turn(wish + question, json.dumps(self._json_object(fact, rng)))

    def _json_object(self, fact: Fact, rng: random.Random) -> dict[str, Any]:
        """An object with known and with arbitrary keys and values of every JSON type."""
        some_topics = [rng.choice(self.facts).topic for _ in range(rng.randint(1, 3))]
        known = {
            "topic": fact.topic,
            "area": fact.area,
            "answer": fact.answer,
            "aspect": fact.aspect,
            "urgent": fact.aspect == "emergency",
            "aliases": list(fact.aliases),
        }
        keys = [
            "name",
            "title",
            "summary",
            "age",
            "count",
            "score",
            "items",
            "tags",
            "value",
            "ok",
            "city",
            "condition",
            "severity",
            "advice",
            "symptoms",
            "id",
            "text",
            "type",
            "level",
            "see_doctor",
            "confidence",
            "result",
        ]
        values = (fact.topic, fact.area, some_topics, rng.randint(0, 120), round(rng.random(), 2), rng.random() < 0.5)
        pairs = rng.sample(sorted(known.items()), rng.randint(1, 3))
        pairs += [(key, rng.choice(values)) for key in rng.sample(keys, rng.randint(0, 3))]
        rng.shuffle(pairs)
        return dict(pairs)


def _turn(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _decisive_words(facts: list[Fact]) -> dict[str, int]:
    """For each fact, how many words of its answer it takes to tell it from all other answers."""
    answers = {fact.id: fact.answer.split() for fact in facts}
    begins = Counter(tuple(a[:n]) for a in answers.values() for n in range(1, len(a) + 1))
    return {
        fact_id: next((n for n in range(1, len(a) + 1) if begins[tuple(a[:n])] == 1), len(a))
        for fact_id, a in answers.items()
    }


def encode_conversation(tokenizer: Any, messages: list[Message]) -> list[int]:
    """Token ids of a conversation as the chat template writes it, then the end-of-text token. An answer that is cut
    short has no end."""
    from modeling.tokenizers import END_OF_TEXT, END_OF_TURN

    text = tokenizer.apply_chat_template(messages, tokenize=False) + END_OF_TEXT
    text = text.removesuffix(UNFINISHED + END_OF_TURN + END_OF_TEXT)
    return tokenizer(text)["input_ids"]
