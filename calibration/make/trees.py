"""Abstract sentences: language-neutral trees that both realisers render."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Case = Literal["nom", "acc", "dat", "gen"]
Gender = Literal["m", "f", "n"]
Number = Literal["sg", "pl"]
Tense = Literal["present", "past", "perfect", "future"]
Determiner = Literal["the", "a", "no", "this", "every", "possessive", "many", "count", "bare"]
Mood = Literal["statement", "yes_no", "where", "when", "why"]
Front = Literal["subject", "time", "place"]


@dataclass(frozen=True)
class Noun:
    """A noun of both languages, with its semantic class."""

    kind: str
    en: str
    en_plural: str
    gender: Gender
    de: str
    de_plural: str
    weak: bool = False

    @property
    def countable(self) -> bool:
        """Mass nouns have no plural and take no indefinite article."""
        return self.en_plural != "-"


@dataclass(frozen=True)
class Adjective:
    """An adjective with the noun classes which it can describe."""

    en: str
    de: str
    kinds: frozenset[str]
    de_stem: str
    en_comparative: str = ""
    de_comparative: str = ""


@dataclass(frozen=True)
class Preposition:
    """A preposition and the German case that it governs."""

    en: str
    de: str
    case: Case


@dataclass(frozen=True)
class Pronoun:
    """A personal pronoun; gender matters in the third person singular only."""

    person: Literal[1, 2, 3]
    number: Number
    gender: Gender = "m"


@dataclass(frozen=True)
class Name:
    """A proper name; persons have a natural gender, cities are neuter."""

    text: str
    gender: Gender


@dataclass(frozen=True)
class NounPhrase:
    """A noun with determiner, adjectives and, if wanted, a possessor in the genitive.

    ``owner`` is the person that a possessive determiner stands for.
    """

    determiner: Determiner
    noun: Noun
    number: Number = "sg"
    adjectives: tuple[Adjective, ...] = ()
    count: int = 0
    owner: Pronoun | None = None
    possessor: NounPhrase | None = None


@dataclass(frozen=True)
class Pair:
    """Two nominals joined by "and"; as a subject it is plural."""

    first: Name | NounPhrase
    second: Name | NounPhrase


Nominal: TypeAlias = "Pronoun | Name | NounPhrase | Pair"


@dataclass(frozen=True)
class Phrase:
    """A prepositional phrase."""

    preposition: Preposition
    nominal: Nominal


@dataclass(frozen=True)
class Adverb:
    """An adverb or a fixed adverbial phrase."""

    en: str
    de: str


@dataclass(frozen=True)
class Frame:
    """What a verb takes: the kind of its complements and their semantic classes."""

    shape: Literal["none", "acc", "dat", "give", "prep", "motion", "that"]
    kinds: frozenset[str] = frozenset()
    preposition: Preposition | None = None


@dataclass(frozen=True)
class Verb:
    """A verb of both languages; an English particle follows the first word ("get up")."""

    en: str
    en_past: str
    en_participle: str
    de: str
    de_er: str
    de_past: str
    de_participle: str
    de_prefix: str
    auxiliary: Literal["haben", "sein"]
    subjects: frozenset[str]
    frame: Frame
    place: bool

    @property
    def de_infinitive(self) -> str:
        """The infinitive with its separable prefix."""
        return self.de_prefix + self.de


@dataclass(frozen=True)
class Modal:
    """A modal verb: ich/du/er/plural forms, present and past."""

    en: str
    en_past: str
    de: tuple[str, str, str, str]
    de_past: str


@dataclass(frozen=True)
class Predicate:
    """What a copula clause says: an adjective, a comparison or a profession."""

    adjective: Adjective | None = None
    degree: Adverb | None = None
    than: Nominal | None = None
    profession: Noun | None = None


@dataclass(frozen=True)
class Clause:
    """One finite clause. Without ``verb`` it is a copula clause with ``predicate``."""

    subject: Nominal
    verb: Verb | None = None
    predicate: Predicate | None = None
    tense: Tense = "present"
    modal: Modal | None = None
    negated: bool = False
    dative: Nominal | None = None
    accusative: Nominal | None = None
    prepositional: Phrase | None = None
    companion: Phrase | None = None
    frequency: Adverb | None = None
    manner: Adverb | None = None
    time: Adverb | None = None
    place: Phrase | None = None
    front: Front = "subject"


@dataclass(frozen=True)
class Conjunction:
    """A subordinating or coordinating conjunction."""

    en: str
    de: str
    subordinating: bool


@dataclass(frozen=True)
class Sentence:
    """A main clause and at most one linked clause, before or after it."""

    main: Clause
    mood: Mood = "statement"
    conjunction: Conjunction | None = None
    linked: Clause | None = None
    linked_first: bool = False


@dataclass(frozen=True)
class Rendering:
    """The two renderings of one abstract sentence."""

    en: str
    de: str
