"""What the composer needs to know about a nominal: its class, its pronoun, its agreement."""

from __future__ import annotations

import dataclasses

from . import lexicon as lex
from .trees import Name, Nominal, Noun, NounPhrase, Pair, Preposition, Pronoun

HUMAN = frozenset({"person", "profession", "family"})
SKY = Pronoun(3, "sg", "n")


def pronoun_for(subject: Nominal) -> Pronoun | None:
    """The pronoun that takes a subject up again; None where "it" or "its" would be needed."""
    if isinstance(subject, Pronoun):
        return None if subject == SKY else subject
    if isinstance(subject, Pair):
        return Pronoun(3, "pl")
    if isinstance(subject, Name):
        return Pronoun(3, "sg", subject.gender)
    if subject.noun.kind not in HUMAN:
        return None
    if subject.number == "pl":
        return Pronoun(3, "pl")
    return None if subject.noun.gender == "n" else Pronoun(3, "sg", subject.noun.gender)


def place_preposition(noun: Noun) -> Preposition:
    """The preposition that says "there" with a place of this class."""
    if noun.kind == "surface":
        return lex.ON
    return lex.BY if noun.kind == "water" else lex.IN


def kind_of(subject: Nominal | None) -> str | None:
    """The semantic class of a subject; "sky" is the "it" of the weather."""
    if subject is None:
        return None
    if isinstance(subject, NounPhrase):
        return subject.noun.kind
    return "sky" if subject == SKY else "person"


def english_marks_tense(subject: Nominal) -> bool:
    """Whether "reads" and "read" differ with this subject."""
    if isinstance(subject, Pronoun):
        return (subject.person, subject.number) == (3, "sg")
    return isinstance(subject, Name) or (isinstance(subject, NounPhrase) and subject.number == "sg")


def plain_if(negated: bool, item: Nominal) -> Nominal:
    """A negated object is definite or simply indefinite: "nicht viele" is left out."""
    if negated and isinstance(item, NounPhrase) and item.determiner in ("many", "count"):
        return dataclasses.replace(item, determiner="bare", count=0)
    return item
