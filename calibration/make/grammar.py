"""The composer: draws abstract sentences and stories at random, within the bounds of sense."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Collection, Sequence
from typing import TypeVar

from . import english, german
from . import lexicon as lex
from .agreement import (
    HUMAN,
    SKY,
    english_marks_tense,
    kind_of,
    place_preposition,
    plain_if,
    pronoun_for,
)
from .trees import (
    Adjective,
    Adverb,
    Clause,
    Conjunction,
    Modal,
    Mood,
    Name,
    Nominal,
    Noun,
    NounPhrase,
    Number,
    Pair,
    Phrase,
    Predicate,
    Pronoun,
    Rendering,
    Sentence,
    Tense,
    Verb,
)

PLACES = frozenset({"room", "building", "outside", "surface", "water"})
_ENTERABLE = frozenset({"room", "building", "outside"})
_THINGS = frozenset({"thing", "clothes", "furniture", "vehicle", "text", "food", "drink"})
_NAMED = frozenset(noun.kind for noun in lex.NOUNS)
_STATES = frozenset({"love", "know", "need", "trust", "begin", "vanish"})

_T = TypeVar("_T")


def render(sentence: Sentence) -> Rendering:
    """Both renderings of a tree."""
    return Rendering(english.sentence(sentence), german.sentence(sentence))


class Composer:
    """Draws sentences from one seeded source of randomness."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def _pick(self, items: Sequence[_T]) -> _T:
        return items[self._random.randrange(len(items))]

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability

    # nominals

    def _noun(self, kinds: Collection[str]) -> Noun:
        return self._pick([noun for noun in lex.NOUNS if noun.kind in kinds])

    def _adjectives(self, noun: Noun, probability: float = 0.35) -> tuple[Adjective, ...]:
        fitting = [item for item in lex.ADJECTIVES if noun.kind in item.kinds]
        if not fitting or not self._chance(probability):
            return ()
        return (self._pick(fitting),)

    def phrase_of(
        self, kinds: Collection[str], owner: Pronoun | None = None, *, definite: bool = False
    ) -> NounPhrase:
        """A noun phrase of one of the classes; ``owner`` allows a possessive determiner."""
        noun = self._noun(kinds)
        adjectives = self._adjectives(noun)
        if noun.kind == "family":
            if owner is None:
                possessor = NounPhrase("the", self._noun({"person", "profession"}))
                return NounPhrase("the", noun, "sg", (), possessor=possessor)
            return NounPhrase("possessive", noun, "sg", adjectives, owner=owner)
        if not noun.countable:
            if noun.kind in ("food", "drink") and not definite and self._chance(0.6):
                return NounPhrase("bare", noun, "sg", adjectives)
            return NounPhrase("the", noun, "sg", adjectives)
        roll = self._random.random()
        number: Number = "pl" if self._chance(0.25) else "sg"
        if definite or roll < 0.42:
            possessor_ = None
            if noun.kind in ("thing", "clothes", "vehicle") and self._chance(0.12):
                possessor_ = NounPhrase("the", self._noun({"person", "profession"}))
            return NounPhrase("the", noun, number, adjectives, possessor=possessor_)
        if roll < 0.66:
            return NounPhrase("a", noun, "sg", adjectives)
        if roll < 0.80 and owner is not None and noun.kind not in PLACES:
            return NounPhrase("possessive", noun, number, adjectives, owner=owner)
        if roll < 0.88:
            return NounPhrase("this", noun, "sg", adjectives)
        if roll < 0.92:
            count = self._random.randrange(2, 11)
            return NounPhrase("count", noun, "pl", adjectives, count=count)
        if roll < 0.96:
            return NounPhrase("many", noun, "pl", adjectives)
        return NounPhrase("bare", noun, "pl", adjectives)

    def subject(self, kinds: Collection[str]) -> Nominal:
        """A subject of one of the classes."""
        if "sky" in kinds:
            return SKY
        if HUMAN & set(kinds):
            roll = self._random.random()
            if roll < 0.32:
                return self._pick(
                    [
                        Pronoun(1, "sg"),
                        Pronoun(2, "sg"),
                        Pronoun(3, "sg", "m"),
                        Pronoun(3, "sg", "f"),
                        Pronoun(1, "pl"),
                        Pronoun(3, "pl"),
                    ]
                )
            if roll < 0.50:
                return self._pick(lex.NAMES)
            if roll < 0.56:
                first, second = self._random.sample(lex.NAMES, 2)
                return Pair(first, second)
            if roll < 0.64:
                owner = self._pick([Pronoun(1, "sg"), Pronoun(2, "sg"), Pronoun(1, "pl")])
                return self.phrase_of({"family"}, owner)
        if self._chance(0.05):
            noun = self._noun(kinds)
            if noun.countable and noun.kind != "family":
                return NounPhrase("every", noun)
        return self.phrase_of(kinds, definite=self._chance(0.6))

    def _person_object(self, subject: Nominal, *, dative: bool) -> Nominal:
        """A person as an object. "them" is left out of the accusative: German "sie" is "her"."""
        if self._chance(0.3):
            choices = [
                Pronoun(1, "sg"),
                Pronoun(2, "sg"),
                Pronoun(1, "pl"),
                Pronoun(3, "sg", "m"),
                Pronoun(3, "sg", "f"),
            ]
            if dative:
                choices.append(Pronoun(3, "pl"))
            if isinstance(subject, Pronoun):
                choices = [item for item in choices if item.person != subject.person]
            return self._pick(choices)
        if self._chance(0.3):
            return self._pick([name for name in lex.NAMES if name != subject])
        return self.phrase_of(HUMAN, pronoun_for(subject))

    # parts of clauses

    def place(self, kinds: Collection[str] = PLACES) -> Phrase:
        """Where something happens."""
        if self._chance(0.12):
            return Phrase(lex.IN, self._pick(lex.CITIES))
        if self._chance(0.15):
            near = self._pick([lex.NEAR, lex.BEHIND, lex.IN_FRONT, lex.UNDER])
            near_kinds = {"plant", "building", "surface"} if near is not lex.UNDER else {"plant"}
            if near is lex.IN_FRONT or near is lex.BEHIND:
                near_kinds = {"building", "plant"}
            return Phrase(near, self.phrase_of(near_kinds, definite=True))
        phrase = self.phrase_of(kinds, definite=self._chance(0.7))
        return Phrase(place_preposition(phrase.noun), phrase)

    def _direction(self) -> Phrase:
        roll = self._random.random()
        if roll < 0.2:
            return Phrase(lex.TO_CITY, self._pick(lex.CITIES))
        if roll < 0.5:
            return Phrase(lex.INTO, self.phrase_of(_ENTERABLE, definite=self._chance(0.7)))
        if roll < 0.6:
            return Phrase(lex.FROM, self.phrase_of({"room", "building"}, definite=True))
        return Phrase(lex.TO, self.phrase_of(PLACES | {"profession"}, definite=self._chance(0.8)))

    def _time(self, tense: Tense, modal: Modal | None) -> Adverb | None:
        if tense == "perfect":
            return None
        if tense == "past":
            return self._pick(lex.PAST_TIMES)
        if tense == "future" or (modal is not None and self._chance(0.5)):
            return self._pick(lex.FUTURE_TIMES)
        return self._pick(lex.PRESENT_TIMES)

    def _tense(self) -> Tense:
        roll = self._random.random()
        if roll < 0.45:
            return "present"
        return "past" if roll < 0.75 else "perfect" if roll < 0.87 else "future"

    def _modal(self, tense: Tense) -> Modal | None:
        if tense == "present" and self._chance(0.25):
            return self._pick(lex.MODALS)
        if tense == "past" and self._chance(0.15):
            return self._pick(lex.MODALS[:3])
        return None

    def clause(
        self,
        subject: Nominal | None = None,
        tense: Tense | None = None,
        *,
        plain: bool = False,
        shapes: Collection[str] = ("none", "acc", "dat", "give", "prep", "motion"),
    ) -> Clause:
        """A clause; ``plain`` leaves out time and fronting (for linked clauses)."""
        tense = tense or self._tense()
        if "none" in shapes and self._chance(0.16):
            return self._copula(subject, tense, plain=plain)
        kind = kind_of(subject)
        fitting = [v for v in lex.VERBS if v.frame.shape in shapes]
        if kind is not None:
            fitting = [v for v in fitting if kind in v.subjects]
        verb = self._pick(fitting)
        subject = subject if subject is not None else self.subject(verb.subjects)
        can_will = kind_of(subject) != "sky" and verb.en not in _STATES
        modal = self._modal(tense) if can_will else None
        negated = self._chance(0.13) and not (modal and modal.en in ("must", "may"))
        if modal is None and verb.en == verb.en_past and not english_marks_tense(subject):
            tense = "future"
        clause = Clause(subject, verb, None, tense, modal, negated)
        clause = self._complements(clause, verb)
        return self._modifiers(clause, verb, plain=plain)

    def _complements(self, clause: Clause, verb: Verb) -> Clause:
        subject = clause.subject
        owner = pronoun_for(subject)
        frame = verb.frame
        if frame.shape == "acc":
            is_person = frame.kinds >= HUMAN and self._chance(0.6)
            accusative: Nominal = (
                self._person_object(subject, dative=False)
                if is_person
                else self.phrase_of(frame.kinds - HUMAN or frame.kinds, owner)
            )
            return dataclasses.replace(clause, accusative=plain_if(clause.negated, accusative))
        if frame.shape == "dat":
            return dataclasses.replace(clause, dative=self._person_object(subject, dative=True))
        if frame.shape == "give":
            gift = plain_if(clause.negated, self.phrase_of(frame.kinds, owner))
            person = self._person_object(subject, dative=True)
            return dataclasses.replace(clause, dative=person, accusative=gift)
        if frame.shape == "prep" and frame.preposition is not None:
            is_person = frame.kinds >= HUMAN and self._chance(0.6)
            item = (
                self._person_object(subject, dative=frame.preposition.case == "dat")
                if is_person
                else self.phrase_of(frame.kinds - HUMAN or frame.kinds, owner)
            )
            return dataclasses.replace(clause, prepositional=Phrase(frame.preposition, item))
        if frame.shape == "motion":
            return dataclasses.replace(clause, place=self._direction())
        return clause

    def _modifiers(self, clause: Clause, verb: Verb, *, plain: bool) -> Clause:
        owner = pronoun_for(clause.subject)
        shape = verb.frame.shape
        if verb.place and self._chance(0.5 if shape == "none" else 0.28):
            clause = dataclasses.replace(clause, place=self.place())
        if shape in ("none", "acc", "motion") and verb.place and self._chance(0.06):
            preposition, kinds = self._pick([(lex.DURING, "event"), (lex.DESPITE, "weather")])
            circumstance = Phrase(preposition, self.phrase_of({kinds}, definite=True))
            clause = dataclasses.replace(clause, companion=circumstance)
        elif owner is not None and shape in ("none", "motion") and self._chance(0.2):
            preposition = lex.WITHOUT if self._chance(0.25) else lex.WITH
            companion = self._person_object(clause.subject, dative=preposition is lex.WITH)
            clause = dataclasses.replace(clause, companion=Phrase(preposition, companion))
        elif owner is not None and shape == "acc" and verb.en in ("buy", "cook", "build", "paint"):
            if self._chance(0.3):
                beneficiary = self._person_object(clause.subject, dative=False)
                clause = dataclasses.replace(clause, companion=Phrase(lex.FOR, beneficiary))
        elif owner is not None and shape in ("none", "motion") and self._chance(0.25):
            extra = lex.TOGETHER if owner.number == "pl" else lex.ALONE
            clause = dataclasses.replace(clause, manner=self._pick([*lex.MANNERS, extra]))
        if plain or kind_of(clause.subject) == "sky" or verb.en in _STATES:
            return clause
        if self._chance(0.45):
            clause = dataclasses.replace(clause, time=self._time(clause.tense, clause.modal))
        elif not clause.negated and self._chance(0.25):
            clause = dataclasses.replace(clause, frequency=self._pick(lex.FREQUENCIES))
        roll = self._random.random()
        if clause.time is not None and roll < 0.4:
            return dataclasses.replace(clause, front="time")
        if clause.place is not None and shape != "motion" and roll > 0.85:
            return dataclasses.replace(clause, front="place")
        return clause

    def _copula(self, subject: Nominal | None, tense: Tense, *, plain: bool) -> Clause:
        if tense == "perfect":
            tense = "past"
        kinds = HUMAN | {"animal"} if self._chance(0.6) else _THINGS | PLACES | {"event"}
        subject = subject if subject is not None else self.subject(kinds)
        kind = kind_of(subject) or "person"
        owner = pronoun_for(subject)
        negated = self._chance(0.12)
        if isinstance(subject, NounPhrase) and subject.adjectives:
            subject = dataclasses.replace(subject, adjectives=())
        fitting = [item for item in lex.ADJECTIVES if kind in item.kinds]
        is_single = isinstance(subject, Name) or (isinstance(subject, Pronoun) and subject.number == "sg")
        if not fitting or (is_single and self._chance(0.12)):
            profession = self._profession(owner)
            predicate = Predicate(profession=profession)
            return Clause(subject, None, predicate, tense)
        adjective = self._pick(fitting)
        if adjective.en_comparative and self._chance(0.25):
            than: Nominal = self.phrase_of({kind}, definite=True)
            if kind == "person" and self._chance(0.5):
                than = self._pick([name for name in lex.NAMES if name != subject])
            return Clause(subject, None, Predicate(adjective, than=than), tense)
        degree = self._pick(lex.DEGREES[: 1 if negated else 4]) if self._chance(0.35) else None
        time = self._time(tense, None) if not plain and self._chance(0.25) else None
        clause = Clause(subject, None, Predicate(adjective, degree), tense, None, negated)
        front = time is not None and self._chance(0.5)
        return dataclasses.replace(clause, time=time, front="time" if front else "subject")

    def _profession(self, owner: Pronoun | None) -> Noun:
        gender = owner.gender if owner and owner.person == 3 else "m"
        return self._pick([n for n in lex.NOUNS if n.kind == "profession" and n.gender == gender])

    # sentences

    def sentence(self, subject: Nominal | None = None, tense: Tense | None = None) -> Sentence:
        """Any sentence; a given subject and tense keep a story together."""
        roll = self._random.random()
        if roll < 0.10 and subject is None:
            return self._question()
        if roll < 0.30:
            return self._linked(subject, tense)
        if roll < 0.37:
            return self._reported(subject, tense)
        return Sentence(self.clause(subject, tense))

    def _question(self) -> Sentence:
        mood: Mood = self._pick(["yes_no", "yes_no", "where", "when", "why"])
        main = dataclasses.replace(self.clause(), front="subject", frequency=None, negated=False, time=None)
        verb = main.verb
        if mood == "where" and (verb is None or not verb.place):
            mood = "yes_no"
        if mood == "where":
            main = dataclasses.replace(main, place=None)
        if mood == "when" and verb is None:
            mood = "why"
        if mood == "yes_no" and self._chance(0.4) and main.tense != "perfect":
            main = dataclasses.replace(main, time=self._time(main.tense, main.modal))
        return Sentence(main, mood)

    def _linked(self, subject: Nominal | None, tense: Tense | None) -> Sentence:
        tense = tense or self._pick(["present", "past", "present"])
        choices: list[Conjunction] = [lex.BECAUSE, lex.BECAUSE, lex.ALTHOUGH, lex.WHILE]
        choices += [lex.BEFORE, lex.AND, lex.AND, lex.BUT]
        if tense == "present":
            choices += [lex.IF, lex.IF]
        conjunction = self._pick(choices)
        main = self.clause(subject, tense, plain=conjunction.subordinating)
        if tense == "present" and conjunction is lex.IF and main.modal is None:
            main = dataclasses.replace(main, tense="future" if self._chance(0.3) else "present")
        linked_subject: Nominal | None = pronoun_for(main.subject)
        if linked_subject is None or self._chance(0.5):
            linked_subject = SKY if self._chance(0.12) else None
        linked_tense: Tense = "past" if main.tense == "past" else "present"
        linked = self.clause(linked_subject, linked_tense, plain=True)
        first = conjunction.subordinating and conjunction is not lex.BEFORE and self._chance(0.35)
        if first:
            # A pronoun must not come before the name that it stands for.
            main_subject = main.subject
            again = pronoun_for(main_subject)
            if linked.subject == again and main_subject != again and subject is None:
                main = dataclasses.replace(main, subject=again)
                linked = dataclasses.replace(linked, subject=main_subject)
            main = dataclasses.replace(main, front="subject")
        return Sentence(main, "statement", conjunction, linked, first)

    def _reported(self, subject: Nominal | None, tense: Tense | None) -> Sentence:
        tense = tense or self._pick(["present", "past"])
        main = self.clause(subject, tense, plain=True, shapes=("that",))
        main = dataclasses.replace(main, modal=None, tense="past" if tense == "past" else "present")
        linked_subject = pronoun_for(main.subject) if self._chance(0.4) else None
        choices: list[Tense] = ["present", "present", "future", "past"]
        linked_tense = self._pick(choices) if tense == "present" else tense
        linked = self.clause(linked_subject, linked_tense, plain=True)
        return Sentence(main, "statement", lex.THAT, linked)

    def fragment(self) -> Rendering:
        """A noun phrase or a prepositional phrase, the way a phrase book lists them."""
        if self._chance(0.35):
            place = self.place() if self._chance(0.5) else self._direction()
            return Rendering(english.phrase(place), german.phrase(place))
        item = self.phrase_of(_NAMED, self._pick([Pronoun(1, "sg"), Pronoun(2, "sg")]))
        if self._chance(0.4):
            word = Clause(item, None, Predicate(self._fitting(item)))
            return Rendering(english.clause_text(word), german.main_clause(word))
        return Rendering(english.noun_phrase(item), german.noun_phrase(item, "nom"))

    def _fitting(self, item: NounPhrase) -> Adjective:
        return self._pick([a for a in lex.ADJECTIVES if item.noun.kind in a.kinds])

    def story(self) -> list[Sentence]:
        """Four to eight sentences about one or two people, in one tense."""
        tense: Tense = "past" if self._chance(0.65) else "present"
        hero: Nominal = self._pick(lex.NAMES)
        if self._chance(0.4):
            hero = self.phrase_of({"profession"}, definite=True)
            hero = dataclasses.replace(hero, number="sg", possessor=None)
        other = self._pick([name for name in lex.NAMES if name != hero])
        hero_again = pronoun_for(hero) or hero
        sentences = [self.sentence(hero, tense)]
        both = isinstance(hero, Name) and self._chance(0.5)
        last: Nominal = hero
        for position in range(self._random.randrange(3, 8)):
            roll = self._random.random()
            subject: Nominal | None
            if roll < 0.45:
                subject = hero_again if last in (hero, hero_again) else hero
            elif roll < 0.6 and both and position > 0 and isinstance(hero, Name):
                subject = Pair(hero, other)
            elif roll < 0.8:
                subject = pronoun_for(other) if last == other else other
            else:
                subject = None
            last = subject if subject is not None else other
            sentences.append(self.sentence(subject, tense))
        return sentences
