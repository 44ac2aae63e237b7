"""The German realiser: morphology and word order.

The order of the middle field is fixed (pronouns, time, dative, accusative, negation, then the
rest), so that one abstract sentence has exactly one German form.
"""

from __future__ import annotations

import re
from typing import Literal

from .lexicon import DE_NUMBERS
from .trees import (
    Case,
    Clause,
    Gender,
    Modal,
    Name,
    Nominal,
    Noun,
    NounPhrase,
    Number,
    Pair,
    Phrase,
    Predicate,
    Pronoun,
    Sentence,
    Verb,
)

Slot = Literal["m", "f", "n", "pl"]

_CASES: tuple[Case, ...] = ("nom", "acc", "dat", "gen")
_SLOTS: tuple[Slot, ...] = ("m", "f", "n", "pl")


def _table(text: str) -> dict[tuple[Case, Slot], str]:
    """Read one row per case with the columns m, f, n, pl; "-" is the empty ending."""
    rows = [row.split() for row in text.split("/")]
    return {
        (case, slot): "" if rows[i][j] == "-" else rows[i][j]
        for i, case in enumerate(_CASES)
        for j, slot in enumerate(_SLOTS)
    }


_THE = _table("der die das die / den die das die / dem der dem den / des der des der")
_STRONG_DETERMINER = _table("er e es e / en e es e / em er em en / es er es er")
_EIN = _table("- e - e / en e - e / em er em en / es er es er")
_WEAK = _table("e e e en / en e e en / en en en en / en en en en")
_MIXED = _table("er e es en / en e es en / en en en en / en en en en")
_STRONG = _table("er e es e / en e es e / em er em en / en er en er")

_CONTRACTIONS = {
    "in dem": "im",
    "in das": "ins",
    "an dem": "am",
    "an das": "ans",
    "zu dem": "zum",
    "zu der": "zur",
    "von dem": "vom",
}

_PRONOUNS: dict[str, tuple[str, str, str]] = {
    "1sg": ("ich", "mich", "mir"),
    "2sg": ("du", "dich", "dir"),
    "3sgm": ("er", "ihn", "ihm"),
    "3sgf": ("sie", "sie", "ihr"),
    "3sgn": ("es", "es", "ihm"),
    "1pl": ("wir", "uns", "uns"),
    "3pl": ("sie", "sie", "ihnen"),
}
_POSSESSIVES = {
    "1sg": "mein",
    "2sg": "dein",
    "3sgm": "sein",
    "3sgf": "ihr",
    "3sgn": "sein",
    "1pl": "unser",
    "3pl": "ihr",
}
_VOWELS = re.compile("[aeiouyäöü]+")
_SEIN = ("bin", "bist", "ist", "sind")
_HABEN = ("habe", "hast", "hat", "haben")
_WERDEN = ("werde", "wirst", "wird", "werden")


def _key(pronoun: Pronoun) -> str:
    gender = pronoun.gender if (pronoun.person, pronoun.number) == (3, "sg") else ""
    return f"{pronoun.person}{pronoun.number}{gender}"


def _slot(gender: Gender, number: Number) -> Slot:
    return "pl" if number == "pl" else gender


def noun_form(noun: Noun, case: Case, number: Number) -> str:
    """The noun inflected for case and number."""
    if number == "pl":
        ends_so = noun.de_plural.endswith(("n", "s"))
        return noun.de_plural + ("n" if case == "dat" and not ends_so else "")
    if noun.weak and case != "nom":
        return noun.de + ("n" if noun.de.endswith(("e", "r")) and noun.de != "Bär" else "en")
    if case == "gen" and noun.gender != "f":
        return _genitive(noun)
    return noun.de


def _genitive(noun: Noun) -> str:
    """-es after one syllable or a sibilant, -s otherwise and for loan words (plural in -s)."""
    word = noun.de
    if word.endswith("us") and not word.endswith("aus"):
        return word + "ses"
    is_short = len(_VOWELS.findall(word.lower())) == 1 and not word.endswith("ee")
    is_loan = noun.de_plural.endswith("s")
    hisses = word.endswith(("s", "ß", "z", "sch"))
    return word + ("es" if hisses or (is_short and not is_loan) else "s")


def determiner_form(phrase: NounPhrase, case: Case) -> str:
    """The determiner; empty for a bare noun phrase."""
    slot = _slot(phrase.noun.gender, phrase.number)
    match phrase.determiner:
        case "the":
            return _THE[case, slot]
        case "this":
            return "dies" + _STRONG_DETERMINER[case, slot]
        case "every":
            return "jed" + _STRONG_DETERMINER[case, slot]
        case "many":
            return "viel" + _STRONG_DETERMINER[case, "pl"]
        case "a":
            return "ein" + _EIN[case, slot]
        case "no":
            return "kein" + _EIN[case, slot]
        case "possessive":
            if phrase.owner is None:
                raise ValueError("a possessive determiner needs an owner")
            return _POSSESSIVES[_key(phrase.owner)] + _EIN[case, slot]
        case "count":
            return DE_NUMBERS[phrase.count]
        case "bare":
            return ""


def noun_phrase(phrase: NounPhrase, case: Case) -> str:
    """Determiner, adjectives with the ending that the determiner asks for, noun, possessor."""
    slot = _slot(phrase.noun.gender, phrase.number)
    if phrase.determiner in ("the", "this", "every"):
        endings = _WEAK
    elif phrase.determiner in ("a", "no", "possessive"):
        endings = _MIXED
    else:
        endings = _STRONG
    words = [determiner_form(phrase, case)]
    words += [adjective.de_stem + endings[case, slot] for adjective in phrase.adjectives]
    words.append(noun_form(phrase.noun, case, phrase.number))
    if phrase.possessor is not None:
        words.append(noun_phrase(phrase.possessor, "gen"))
    return " ".join(word for word in words if word)


def nominal(item: Nominal, case: Case) -> str:
    """Any nominal in a case; names are not inflected."""
    if isinstance(item, Pronoun):
        return _PRONOUNS[_key(item)][_CASES.index(case)]
    if isinstance(item, Name):
        return item.text
    if isinstance(item, Pair):
        return f"{nominal(item.first, case)} und {nominal(item.second, case)}"
    return noun_phrase(item, case)


def phrase(item: Phrase) -> str:
    """A prepositional phrase, with the usual contractions of a definite article."""
    text = f"{item.preposition.de} {nominal(item.nominal, item.preposition.case)}"
    if isinstance(item.nominal, NounPhrase) and item.nominal.determiner == "the":
        two, rest = " ".join(text.split(" ")[:2]), text.split(" ")[2:]
        if item.nominal.number == "sg" and two in _CONTRACTIONS:
            return " ".join([_CONTRACTIONS[two], *rest])
    return text


def _agreement(subject: Nominal) -> int:
    """Index of the verb form: ich, du, er, plural."""
    if isinstance(subject, Pronoun):
        return 3 if subject.number == "pl" else subject.person - 1
    if isinstance(subject, Pair):
        return 3
    return 3 if isinstance(subject, NounPhrase) and subject.number == "pl" else 2


def present(verb: Verb, form: int) -> str:
    """The present tense without the separable prefix."""
    if form == 3:
        return verb.de
    if form == 2:
        return verb.de_er
    if verb.de == "wissen":
        return ("weiß", "weißt")[form]
    if form == 0:
        return verb.de[:-3] + "le" if verb.de.endswith("eln") else _first_person(verb.de)
    stem = verb.de_er.removesuffix("t")
    return stem + ("t" if stem.endswith(("s", "ß", "z", "x")) else "st")


def _first_person(infinitive: str) -> str:
    return infinitive[:-1] + ("e" if infinitive.endswith("ern") else "")


def past(form_of_er: str, form: int) -> str:
    """The preterite from its ich/er form."""
    if form in (0, 2):
        return form_of_er
    weak = form_of_er.endswith("te")
    if form == 3:
        return form_of_er + ("n" if weak else "en")
    hissing = form_of_er.endswith(("s", "ß", "z", "t", "d"))
    return form_of_er + ("est" if hissing and not weak else "st")


def _modal(modal: Modal, clause: Clause, form: int) -> str:
    return past(modal.de_past, form) if clause.tense == "past" else modal.de[form]


def verb_complex(clause: Clause) -> tuple[str, str, str]:
    """The finite verb, the right bracket of a main clause, and the verb-final cluster."""
    form = _agreement(clause.subject)
    verb = clause.verb
    infinitive = verb.de_infinitive if verb else "sein"
    if clause.modal is not None:
        finite = _modal(clause.modal, clause, form)
        return finite, infinitive, f"{infinitive} {finite}"
    if clause.tense == "future":
        return _WERDEN[form], infinitive, f"{infinitive} {_WERDEN[form]}"
    if clause.tense == "perfect":
        participle = verb.de_participle if verb else "gewesen"
        auxiliaries = _SEIN if verb is None or verb.auxiliary == "sein" else _HABEN
        return auxiliaries[form], participle, f"{participle} {auxiliaries[form]}"
    if verb is None:
        finite = _SEIN[form] if clause.tense == "present" else past("war", form)
        return finite, "", finite
    finite = present(verb, form) if clause.tense == "present" else past(verb.de_past, form)
    return finite, verb.de_prefix, verb.de_prefix + finite


def _predicate(predicate: Predicate) -> str:
    if predicate.profession is not None:
        return noun_form(predicate.profession, "nom", "sg")
    adjective = predicate.adjective
    if adjective is None:
        raise ValueError("a predicate needs an adjective or a profession")
    if predicate.than is not None:
        return f"{adjective.de_comparative} als {nominal(predicate.than, 'nom')}"
    return f"{predicate.degree.de} {adjective.de}" if predicate.degree else adjective.de


def _object(clause: Clause) -> tuple[Nominal | None, bool]:
    """The accusative object; a negated indefinite one takes "kein" instead of "nicht"."""
    item = clause.accusative
    if clause.negated and isinstance(item, NounPhrase) and item.determiner in ("a", "bare"):
        negative = NounPhrase("no", item.noun, item.number, item.adjectives, possessor=item.possessor)
        return negative, True
    return item, False


def _middle(clause: Clause) -> list[str]:
    accusative, has_kein = _object(clause)
    objects: list[tuple[Nominal | None, Case]] = [(accusative, "acc"), (clause.dative, "dat")]
    words = [nominal(item, case) for item, case in objects if isinstance(item, Pronoun)]
    if clause.time is not None and clause.front != "time":
        words.append(clause.time.de)
    if clause.frequency is not None:
        words.append(clause.frequency.de)
    for item, case in reversed(objects):
        if item is not None and not isinstance(item, Pronoun):
            words.append(nominal(item, case))
    if clause.negated and not has_kein:
        words.append("nicht")
    for extra in (clause.prepositional, clause.companion):
        if extra is not None:
            words.append(phrase(extra))
    if clause.manner is not None:
        words.append(clause.manner.de)
    if clause.place is not None and clause.front != "place":
        words.append(phrase(clause.place))
    if clause.predicate is not None:
        words.append(_predicate(clause.predicate))
    return words


def main_clause(clause: Clause, *, finite_first: bool = False) -> str:
    """A verb-second clause, or a verb-first one (questions; after a fronted clause)."""
    finite, bracket, _ = verb_complex(clause)
    subject = nominal(clause.subject, "nom")
    if finite_first:
        words = [finite, subject]
    elif clause.front == "time" and clause.time is not None:
        words = [clause.time.de, finite, subject]
    elif clause.front == "place" and clause.place is not None:
        words = [phrase(clause.place), finite, subject]
    else:
        words = [subject, finite]
    return " ".join([*words, *_middle(clause), *([bracket] if bracket else [])])


def subordinate_clause(clause: Clause) -> str:
    """A verb-final clause without its conjunction."""
    subject = nominal(clause.subject, "nom")
    return " ".join([subject, *_middle(clause), verb_complex(clause)[2]])


_QUESTIONS = {"where": "wo ", "when": "wann ", "why": "warum "}


def sentence(item: Sentence) -> str:
    """The whole German sentence with capital and full stop."""
    is_question = item.mood != "statement"
    link = ""
    if item.conjunction is not None and item.linked is not None:
        word = item.conjunction.de
        if item.conjunction.subordinating:
            link = f"{word} {subordinate_clause(item.linked)}"
        else:
            link = f"{word} {main_clause(item.linked)}"
    if link and item.linked_first:
        text = f"{link}, {main_clause(item.main, finite_first=True)}"
    else:
        question = _QUESTIONS.get(item.mood, "")
        text = question + main_clause(item.main, finite_first=is_question)
        if link:
            text += (" " if link.startswith("und ") else ", ") + link
    return text[0].upper() + text[1:] + ("?" if is_question else ".")
