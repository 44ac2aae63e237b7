"""The English realiser: articles, plurals, agreement, do-support and word order."""

from __future__ import annotations

from .lexicon import EN_NUMBERS
from .trees import (
    Clause,
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
)

_PRONOUNS = {
    "1sg": ("I", "me", "my"),
    "2sg": ("you", "you", "your"),
    "3sgm": ("he", "him", "his"),
    "3sgf": ("she", "her", "her"),
    "3sgn": ("it", "it", "its"),
    "1pl": ("we", "us", "our"),
    "3pl": ("they", "them", "their"),
}


def _key(pronoun: Pronoun) -> str:
    gender = pronoun.gender if (pronoun.person, pronoun.number) == (3, "sg") else ""
    return f"{pronoun.person}{pronoun.number}{gender}"


def noun_form(noun: Noun, number: Number) -> str:
    """Singular or plural."""
    return noun.en_plural if number == "pl" else noun.en


def noun_phrase(phrase: NounPhrase) -> str:
    """Determiner, adjectives, noun and an of-phrase for the possessor."""
    words = [adjective.en for adjective in phrase.adjectives]
    words.append(noun_form(phrase.noun, phrase.number))
    match phrase.determiner:
        case "possessive":
            if phrase.owner is None:
                raise ValueError("a possessive determiner needs an owner")
            words.insert(0, _PRONOUNS[_key(phrase.owner)][2])
        case "a":
            words.insert(0, "an" if words[0][0] in "aeiou" else "a")
        case "count":
            words.insert(0, EN_NUMBERS[phrase.count])
        case "bare":
            pass
        case _:
            words.insert(0, phrase.determiner)
    if phrase.possessor is not None:
        words.append("of " + noun_phrase(phrase.possessor))
    return " ".join(words)


def nominal(item: Nominal, *, is_object: bool = False) -> str:
    """Any nominal; only pronouns tell subject from object."""
    if isinstance(item, Pronoun):
        return _PRONOUNS[_key(item)][1 if is_object else 0]
    if isinstance(item, Name):
        return item.text
    if isinstance(item, Pair):
        return f"{nominal(item.first)} and {nominal(item.second)}"
    return noun_phrase(item)


def phrase(item: Phrase) -> str:
    """A prepositional phrase."""
    return f"{item.preposition.en} {nominal(item.nominal, is_object=True)}"


def _is_third_singular(subject: Nominal) -> bool:
    if isinstance(subject, Pronoun):
        return (subject.person, subject.number) == (3, "sg")
    if isinstance(subject, Pair):
        return False
    return isinstance(subject, Name) or subject.number == "sg"


def third_person(verb: str) -> str:
    """The third person singular; a particle stays behind the verb ("gets up")."""
    head, space, rest = verb.partition(" ")
    if head == "have":
        head = "has"
    elif head.endswith(("s", "x", "z", "ch", "sh", "o")):
        head += "es"
    elif head.endswith("y") and head[-2] not in "aeiou":
        head = head[:-1] + "ies"
    else:
        head += "s"
    return head + space + rest


def _be(clause: Clause) -> str:
    subject = clause.subject
    third = _is_third_singular(subject)
    first = isinstance(subject, Pronoun) and (subject.person, subject.number) == (1, "sg")
    if clause.tense == "past":
        return "was" if third or first else "were"
    return "is" if third else "am" if first else "are"


def _verb_group(clause: Clause, *, is_question: bool) -> tuple[str, str]:
    """The operator (auxiliary, may be empty) and the rest of the verb group."""
    third = _is_third_singular(clause.subject)
    verb = clause.verb
    base = verb.en if verb else "be"
    modal = clause.modal
    is_past = clause.tense == "past"
    if modal is not None and modal.en != "want to" and not (is_past and modal.en == "must"):
        return (modal.en_past if is_past else modal.en), base
    if clause.tense == "future":
        return "will", base
    if clause.tense == "perfect":
        return ("has" if third else "have"), (verb.en_participle if verb else "been")
    if modal is not None:
        base = ("want to " if modal.en == "want to" else "have to ") + base
        past_form = modal.en_past + base.removeprefix("want to").removeprefix("have to")
    elif verb is None:
        return _be(clause), ""
    else:
        past_form = verb.en_past
    if clause.negated or is_question:
        return ("did" if is_past else "does" if third else "do"), base
    if is_past:
        return "", past_form
    return "", third_person(base) if third else base


def _predicate(predicate: Predicate) -> str:
    if predicate.profession is not None:
        word = predicate.profession.en
        return f"an {word}" if word[0] in "aeiou" else f"a {word}"
    adjective = predicate.adjective
    if adjective is None:
        raise ValueError("a predicate needs an adjective or a profession")
    if predicate.than is not None:
        return f"{adjective.en_comparative} than {nominal(predicate.than)}"
    return f"{predicate.degree.en} {adjective.en}" if predicate.degree else adjective.en


def clause_text(clause: Clause, *, is_question: bool = False) -> str:
    """One finite clause in English order."""
    operator, rest = _verb_group(clause, is_question=is_question)
    if clause.negated:
        operator = "cannot" if operator == "can" and not is_question else operator
        negation = "" if operator == "cannot" else "not"
    else:
        negation = ""
    subject = nominal(clause.subject)
    words = [operator, subject] if is_question else [subject, operator]
    words.append(negation)
    if clause.frequency is not None:
        words.append(clause.frequency.en)
    words.append(rest)
    if clause.predicate is not None:
        words.append(_predicate(clause.predicate))
    for item in (clause.dative, clause.accusative):
        if item is not None:
            words.append(nominal(item, is_object=True))
    moves = clause.verb is not None and clause.verb.frame.shape == "motion"
    if moves and clause.place is not None:
        words.append(phrase(clause.place))
    for extra in (clause.prepositional, clause.companion):
        if extra is not None:
            words.append(phrase(extra))
    if clause.manner is not None:
        words.append(clause.manner.en)
    if clause.place is not None and not moves:
        if clause.front == "place" and not is_question:
            words.insert(0, phrase(clause.place))
        else:
            words.append(phrase(clause.place))
    if clause.time is not None:
        if clause.front == "time" and not is_question:
            words.insert(0, clause.time.en)
        else:
            words.append(clause.time.en)
    return " ".join(word for word in words if word)


_QUESTIONS = {"where": "where ", "when": "when ", "why": "why "}


def sentence(item: Sentence) -> str:
    """The whole English sentence with capital and full stop."""
    is_question = item.mood != "statement"
    text = _QUESTIONS.get(item.mood, "") + clause_text(item.main, is_question=is_question)
    if item.conjunction is not None and item.linked is not None:
        link = f"{item.conjunction.en} {clause_text(item.linked)}"
        if item.linked_first:
            text = f"{link}, {text}"
        else:
            text += (", " if item.conjunction.en == "but" else " ") + link
    return text[0].upper() + text[1:] + ("?" if is_question else ".")
