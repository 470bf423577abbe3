"""A small invented fact base, two-hop questions over it, and the tool-call transcripts that answer them."""

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache
from math import fsum, log

from hf_rb.tiny.problems import _hash


__all__ = ["Fact", "Question", "fact_base", "generate_transcripts", "questions", "search"]

TOWNS, PEOPLE = 40, 120
JOBS = [
    "baker",
    "pilot",
    "nurse",
    "painter",
    "miller",
    "judge",
    "sailor",
    "tailor",
    "doctor",
    "farmer",
    "singer",
    "weaver",
]
_STARTS = [
    "Al",
    "Bor",
    "Cal",
    "Dor",
    "El",
    "Fen",
    "Gal",
    "Har",
    "Il",
    "Kor",
    "Lan",
    "Mar",
    "Nor",
    "Or",
    "Pel",
    "Ros",
    "Sel",
    "Tar",
    "Ul",
    "Vel",
]
_TOWN_ENDS = ["ford", "wick", "dale", "ham", "mere", "stead"]
_PERSON_ENDS = ["a", "ian", "en", "ina", "ric", "wyn", "o", "is"]
_FAMILIES = ["Ash", "Brook", "Cole", "Dale", "Frost", "Gray", "Hill", "Lake", "Moss", "Reed", "Stone", "Wood"]
_RIVER_ENDS = ["ow", "une", "ire"]
TEST_SHARE = 6


@dataclass(frozen=True)
class Fact:
    """`relation(subject) = value`, and the sentence that says so."""

    relation: str
    subject: str
    value: str

    @property
    def text(self) -> str:
        return _SENTENCES[self.relation].format(self.subject, self.value)


@dataclass(frozen=True)
class Question:
    """A two-hop question.

    Attributes:
        text (`str`): The question.
        hops (`tuple[Fact, Fact]`): The two facts that answer it; the value of the first is the subject of the second.
        answer (`str`): The value of the second fact.
    """

    text: str
    hops: tuple[Fact, Fact]

    @property
    def answer(self) -> str:
        return self.hops[1].value

    @property
    def held_out(self) -> bool:
        return _hash(self.text) % TEST_SHARE == 0


_SENTENCES = {
    "mayor": "The mayor of {} is {}.",
    "river": "{} lies on the river {}.",
    "born": "{} was born in {}.",
    "job": "{} works as a {}.",
    "married": "{} is married to {}.",
}
_QUERIES = {
    "mayor": "mayor of {}",
    "river": "river of {}",
    "born": "where was {} born",
    "job": "job of {}",
    "married": "who is {} married to",
}
_QUESTIONS = {
    ("mayor", "born"): "In which town was the mayor of {} born?",
    ("mayor", "job"): "What is the job of the mayor of {}?",
    ("mayor", "married"): "Who is married to the mayor of {}?",
    ("married", "born"): "In which town was the person married to {} born?",
    ("married", "job"): "What is the job of the person married to {}?",
    ("born", "river"): "On which river lies the town where {} was born?",
}


@cache
def fact_base() -> tuple[Fact, ...]:
    """Returns all facts: a mayor and a river for each town; a birthplace, a job and a spouse for each person."""
    rng = random.Random(_hash("facts"))
    towns = rng.sample([start + end for start in _STARTS for end in _TOWN_ENDS], TOWNS)
    given_names = rng.sample([start + end for start in _STARTS for end in _PERSON_ENDS], PEOPLE)
    people = [f"{name} {rng.choice(_FAMILIES)}" for name in given_names]
    rivers = rng.sample([start + end for start in _STARTS for end in _RIVER_ENDS], TOWNS)
    facts = [Fact("mayor", town, person) for town, person in zip(towns, rng.sample(people, TOWNS), strict=True)]
    facts += [Fact("river", town, river) for town, river in zip(towns, rivers, strict=True)]
    facts += [Fact("born", person, rng.choice(towns)) for person in people]
    facts += [Fact("job", person, rng.choice(JOBS)) for person in people]
    for left, right in zip(people[::2], people[1::2], strict=True):
        facts += [Fact("married", left, right), Fact("married", right, left)]
    return tuple(facts)


def questions(split: str = "train") -> list[Question]:
    """Returns the two-hop questions of one split (`"train"` or `"test"`), in a fixed order."""
    by_subject = {(fact.relation, fact.subject): fact for fact in fact_base()}
    found = []
    for first in fact_base():
        for (relation, then), template in _QUESTIONS.items():
            if relation == first.relation:
                found.append(Question(template.format(first.subject), (first, by_subject[then, first.value])))
    return [question for question in found if question.held_out == (split == "test")]


def _words(text: str) -> set[str]:
    return set(text.lower().replace(".", " ").replace("?", " ").split())


def _fact_words(fact: Fact) -> set[str]:
    return _words(fact.text) | {fact.relation}


@cache
def _word_weights() -> dict[str, float]:
    """Inverse document frequency of every word of the fact base."""
    counts = Counter(word for fact in fact_base() for word in _fact_words(fact))
    return {word: log(len(fact_base()) / count) for word, count in counts.items()}


def search(query: str) -> str:
    """
    Search the fact base.

    Args:
        query: What to look for.

    Returns:
        The two best matching facts, one a line.
    """
    weights = _word_weights()
    words = _words(query)
    ranked = sorted(fact_base(), key=lambda fact: -fsum(weights[word] for word in words & _fact_words(fact)))
    return "\n".join(fact.text for fact in ranked[:2])


def transcript(question: Question) -> list[dict]:
    """Returns the messages of a run that answers `question` with one search a hop."""
    messages: list[dict] = [{"role": "user", "content": question.text}]
    for fact in question.hops:
        query = _QUERIES[fact.relation].format(fact.subject)
        call = {"type": "function", "function": {"name": "search", "arguments": {"query": query}}}
        messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        messages.append({"role": "tool", "name": "search", "content": search(query)})
    messages.append({"role": "assistant", "content": f"{question.hops[1].text} #### {question.answer}"})
    return messages


def generate_transcripts(split: str = "train") -> list[tuple[Question, list[dict]]]:
    """Returns every question of a split with its transcript."""
    return [(question, transcript(question)) for question in questions(split)]
