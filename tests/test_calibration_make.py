"""The maker of the embedded model: grammar, texts, records and the model's own figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from calibration.make import english, german, sources, texts, train
from calibration.make import lexicon as lex
from calibration.make.grammar import Composer, render
from calibration.make.trees import (
    Case,
    Clause,
    Determiner,
    Name,
    NounPhrase,
    Number,
    Pair,
    Phrase,
    Predicate,
    Pronoun,
    Sentence,
)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "calibration"
BASE = ROOT / "qexport" / "embedded" / "base"
ADAPTER = ROOT / "qexport" / "embedded" / "adapter"

ME, YOU, HE, SHE = Pronoun(1, "sg"), Pronoun(2, "sg"), Pronoun(3, "sg"), Pronoun(3, "sg", "f")
WE, THEY = Pronoun(1, "pl"), Pronoun(3, "pl")
ANNA, PAUL, BERLIN = Name("Anna", "f"), Name("Paul", "m"), Name("Berlin", "n")
TODAY, YESTERDAY, TOMORROW = lex.PRESENT_TIMES[0], lex.PAST_TIMES[0], lex.FUTURE_TIMES[0]
CAN, MUST, WANT = lex.MODALS[:3]


def np(
    determiner: Determiner,
    noun: str,
    *adjectives: str,
    number: Number = "sg",
    owner: Pronoun | None = None,
    count: int = 0,
) -> NounPhrase:
    """A noun phrase from English words."""
    found = tuple(lex.adjective(word) for word in adjectives)
    return NounPhrase(determiner, lex.noun(noun), number, found, count=count, owner=owner)


@pytest.mark.parametrize(
    ("phrase", "case", "golden"),
    [
        # weak endings after the definite article
        (np("the", "dog", "old"), "nom", "der alte Hund"),
        (np("the", "dog", "old"), "acc", "den alten Hund"),
        (np("the", "dog", "old"), "dat", "dem alten Hund"),
        (np("the", "dog", "old"), "gen", "des alten Hundes"),
        (np("the", "cat", "old"), "nom", "die alte Katze"),
        (np("the", "cat", "old"), "acc", "die alte Katze"),
        (np("the", "cat", "old"), "dat", "der alten Katze"),
        (np("the", "house", "old"), "nom", "das alte Haus"),
        (np("the", "house", "old"), "acc", "das alte Haus"),
        (np("the", "house", "old"), "dat", "dem alten Haus"),
        (np("the", "house", "old", number="pl"), "dat", "den alten Häusern"),
        (np("this", "house", "old"), "nom", "dieses alte Haus"),
        (np("every", "table", "new"), "acc", "jeden neuen Tisch"),
        # mixed endings after ein, kein and the possessives
        (np("a", "dog", "old"), "nom", "ein alter Hund"),
        (np("a", "dog", "old"), "acc", "einen alten Hund"),
        (np("a", "dog", "old"), "dat", "einem alten Hund"),
        (np("a", "cat", "old"), "nom", "eine alte Katze"),
        (np("a", "cat", "old"), "dat", "einer alten Katze"),
        (np("a", "house", "old"), "nom", "ein altes Haus"),
        (np("a", "house", "old"), "acc", "ein altes Haus"),
        (np("a", "house", "old"), "gen", "eines alten Hauses"),
        (np("no", "house", "old", number="pl"), "acc", "keine alten Häuser"),
        (np("possessive", "coat", "warm", owner=SHE), "acc", "ihren warmen Mantel"),
        (np("possessive", "coat", "warm", owner=WE), "nom", "unser warmer Mantel"),
        # strong endings without an article, after numerals and after "viele"
        (np("bare", "coffee", "cold"), "nom", "kalter Kaffee"),
        (np("bare", "coffee", "cold"), "acc", "kalten Kaffee"),
        (np("bare", "coffee", "cold"), "dat", "kaltem Kaffee"),
        (np("bare", "milk", "fresh"), "nom", "frische Milch"),
        (np("bare", "milk", "fresh"), "dat", "frischer Milch"),
        (np("bare", "bread", "fresh"), "acc", "frisches Brot"),
        (np("bare", "bread", "fresh"), "dat", "frischem Brot"),
        (np("count", "book", "new", number="pl", count=3), "nom", "drei neue Bücher"),
        (np("count", "book", "new", number="pl", count=3), "dat", "drei neuen Büchern"),
        (np("many", "book", "new", number="pl"), "dat", "vielen neuen Büchern"),
        # weak nouns and stems that change
        (np("the", "boy", "brave"), "acc", "den mutigen Jungen"),
        (np("a", "student"), "dat", "einem Studenten"),
        (np("a", "kitchen", "dark"), "nom", "eine dunkle Küche"),
        (np("the", "car", "expensive"), "dat", "dem teuren Auto"),
        (np("the", "castle", "high"), "nom", "das hohe Schloss"),
        (np("the", "bus"), "gen", "des Busses"),
        (np("the", "teacher"), "gen", "des Lehrers"),
    ],
)
def test_noun_phrases(phrase: NounPhrase, case: Case, golden: str) -> None:
    assert german.noun_phrase(phrase, case) == golden


@pytest.mark.parametrize(
    ("verb", "present", "past"),
    [
        ("schlafen", "schlafe schläfst schläft schlafen", "schlief schliefst schlief schliefen"),
        ("arbeiten", "arbeite arbeitest arbeitet arbeiten", "arbeitete arbeitetest - arbeiteten"),
        ("lesen", "lese liest liest lesen", "las lasest las lasen"),
        ("nehmen", "nehme nimmst nimmt nehmen", "nahm nahmst nahm nahmen"),
        ("lächeln", "lächle lächelst lächelt lächeln", "lächelte lächeltest - lächelten"),
        ("füttern", "füttere fütterst füttert füttern", "fütterte füttertest - fütterten"),
        ("wissen", "weiß weißt weiß wissen", "wusste wusstest wusste wussten"),
        ("tanzen", "tanze tanzt tanzt tanzen", "tanzte tanztest tanzte tanzten"),
        ("finden", "finde findest findet finden", "fand fandest fand fanden"),
    ],
)
def test_conjugation(verb: str, present: str, past: str) -> None:
    word = lex.verb(verb)
    assert [german.present(word, form) for form in range(4)] == present.split()
    for form, golden in enumerate(past.split()):
        assert german.past(word.de_past, form) == golden or golden == "-"


SLEEP = Clause(np("the", "dog"), lex.verb("schlafen"))
GET_UP = lex.verb("aufstehen")
READ = lex.verb("lesen")
KITCHEN = Phrase(lex.IN, np("the", "kitchen"))


@pytest.mark.parametrize(
    ("tree", "golden_de", "golden_en"),
    [
        (
            Sentence(Clause(HE, lex.verb("essen"), accusative=np("a", "apple"), place=KITCHEN)),
            "Er isst einen Apfel in der Küche.",
            "He eats an apple in the kitchen.",
        ),
        (  # verb second after a fronted adverb
            Sentence(
                Clause(
                    np("the", "woman"),
                    lex.verb("kaufen"),
                    tense="past",
                    accusative=np("bare", "bread", "fresh"),
                    time=YESTERDAY,
                    front="time",
                )
            ),
            "Gestern kaufte die Frau frisches Brot.",
            "Yesterday the woman bought fresh bread.",
        ),
        (  # verb final after a subordinating conjunction
            Sentence(
                Clause(ANNA, lex.verb("lachen")),
                "statement",
                lex.BECAUSE,
                Clause(SHE, READ, accusative=np("a", "story", "funny")),
            ),
            "Anna lacht, weil sie eine lustige Geschichte liest.",
            "Anna laughs because she reads a funny story.",
        ),
        (  # fronted clause, inversion, modal at the very end
            Sentence(
                Clause(HE, lex.verb("kommen"), negated=True, place=Phrase(lex.TO_CITY, BERLIN)),
                "statement",
                lex.IF,
                Clause(PAUL, lex.verb("arbeiten"), modal=MUST),
                linked_first=True,
            ),
            "Wenn Paul arbeiten muss, kommt er nicht nach Berlin.",
            "If Paul must work, he does not come to Berlin.",
        ),
        (  # separable prefix in a main clause, a subordinate clause and the perfect
            Sentence(Clause(WE, GET_UP, time=TODAY), "statement", lex.WHILE, Clause(THEY, GET_UP)),
            "Wir stehen heute auf, während sie aufstehen.",
            "We get up today while they get up.",
        ),
        (
            Sentence(Clause(SHE, GET_UP, tense="perfect", manner=lex.MANNERS[0])),
            "Sie ist schnell aufgestanden.",
            "She has got up quickly.",
        ),
        (
            Sentence(Clause(ME, lex.verb("anrufen"), tense="future", accusative=YOU)),
            "Ich werde dich anrufen.",
            "I will call you.",
        ),
        (  # nicht and kein
            Sentence(Clause(ME, READ, negated=True, accusative=np("the", "book"))),
            "Ich lese das Buch nicht.",
            "I do not read the book.",
        ),
        (
            Sentence(Clause(PAUL, READ, tense="past", negated=True, accusative=np("a", "letter", "long"))),
            "Paul las keinen langen Brief.",
            "Paul did not read a long letter.",
        ),
        (
            Sentence(Clause(SHE, lex.verb("schlafen"), negated=True, modal=CAN, place=KITCHEN)),
            "Sie kann nicht in der Küche schlafen.",
            "She cannot sleep in the kitchen.",
        ),
        (  # dative before accusative, pronouns first
            Sentence(
                Clause(
                    YOU,
                    lex.verb("geben"),
                    time=TOMORROW,
                    tense="future",
                    dative=np("the", "child"),
                    accusative=np("a", "ball", "red"),
                )
            ),
            "Du wirst morgen dem Kind einen roten Ball geben.",
            "You will give the child a red ball tomorrow.",
        ),
        (
            Sentence(Clause(THEY, lex.verb("helfen"), dative=HE, time=TODAY)),
            "Sie helfen ihm heute.",
            "They help him today.",
        ),
        (  # questions
            Sentence(Clause(HE, READ, tense="past", accusative=np("the", "poem")), "yes_no"),
            "Las er das Gedicht?",
            "Did he read the poem?",
        ),
        (Sentence(SLEEP, "where"), "Wo schläft der Hund?", "Where does the dog sleep?"),
        (  # agreement with a joined subject; an object that agrees with its owner
            Sentence(
                Clause(
                    Pair(ANNA, PAUL),
                    lex.verb("suchen"),
                    tense="past",
                    accusative=np("possessive", "dog", owner=THEY),
                )
            ),
            "Anna und Paul suchten ihren Hund.",
            "Anna and Paul looked for their dog.",
        ),
        (  # contractions
            Sentence(Clause(ME, lex.verb("gehen"), place=Phrase(lex.TO, np("the", "school")))),
            "Ich gehe zur Schule.",
            "I go to the school.",
        ),
        (
            Sentence(Clause(HE, lex.verb("laufen"), place=Phrase(lex.INTO, np("the", "house")))),
            "Er läuft ins Haus.",
            "He runs into the house.",
        ),
        (
            Sentence(Clause(ANNA, lex.verb("weinen"), companion=Phrase(lex.DESPITE, np("the", "film")))),
            "Anna weint trotz des Filmes.",
            "Anna cries despite the film.",
        ),
        (
            Sentence(Clause(ANNA, None, Predicate(lex.adjective("old"), than=PAUL), negated=True)),
            "Anna ist nicht älter als Paul.",
            "Anna is not older than Paul.",
        ),
        (
            Sentence(Clause(SHE, None, Predicate(profession=lex.noun("actress")), tense="past")),
            "Sie war Schauspielerin.",
            "She was an actress.",
        ),
        (
            Sentence(
                Clause(HE, lex.verb("schlafen"), modal=WANT, negated=True),
                "statement",
                lex.BUT,
                Clause(HE, lex.verb("arbeiten"), modal=MUST, tense="past", negated=True),
            ),
            "Er will nicht schlafen, aber er musste nicht arbeiten.",
            "He does not want to sleep, but he did not have to work.",
        ),
    ],
)
def test_golden_sentences(tree: Sentence, golden_de: str, golden_en: str) -> None:
    assert german.sentence(tree) == golden_de
    assert english.sentence(tree) == golden_en


@pytest.mark.parametrize(
    ("base", "golden"), [("carry", "carries"), ("watch", "watches"), ("get up", "gets up")]
)
def test_third_person(base: str, golden: str) -> None:
    assert english.third_person(base) == golden


def test_drawn_sentences_are_well_formed() -> None:
    composer = Composer("well-formed")
    for _ in range(3000):
        line = render(composer.sentence())
        for text in (line.en, line.de):
            assert re.fullmatch(r"[A-ZÄÖÜ][A-Za-zÄÖÜäöüß, ]*[.?]", text), text
            assert "  " not in text
        assert line.en.endswith("?") == line.de.endswith("?")
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", line.en, re.IGNORECASE), line.en
        assert not re.search(r"\b(in|an|zu|von) dem [A-ZÄÖÜ]|\bzu der ", line.de), line.de


def test_one_english_sentence_has_one_german_sentence() -> None:
    composer = Composer("one-to-one")
    forward: dict[str, str] = {}
    backward: dict[str, str] = {}
    for _ in range(20_000):
        line = render(composer.sentence())
        assert forward.setdefault(line.en, line.de) == line.de
        assert backward.setdefault(line.de, line.en) == line.en


def test_the_seed_determines_the_texts() -> None:
    first, second, other = texts.make_texts(3), texts.make_texts(3), texts.make_texts(4)
    assert first == second
    assert first.pairs != other.pairs


def _sentences(text: str) -> set[str]:
    plain = text
    for token in texts.SPECIAL_TOKENS:
        plain = plain.replace(token, "\n")
    for prefix in (texts.INTO_GERMAN, texts.INTO_ENGLISH):
        plain = plain.replace(prefix, "\n")
    return {part for part in re.split(r"(?<=[.?])\s+|\n| = ", plain) if part}


def _rows(name: str) -> list[dict[str, str]]:
    lines = (DATA / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_heldout_sentences_are_in_no_other_text() -> None:
    made = texts.make_texts(7)
    shipped = {part for row in _rows("heldout.jsonl") for part in _sentences(row["text"])}
    shipped |= {part for row in _rows("pairs.jsonl") for v in row.values() for part in _sentences(v)}
    assert shipped <= made.heldout_sentences
    calibration = {part for row in _rows("calibration.jsonl") for part in _sentences(row["text"])}
    assert not calibration & shipped
    base = texts.base_documents(7, made.heldout_sentences)
    adapter = texts.training_writer(7, "adapter", made.heldout_sentences)
    bare = {part.rstrip(".?").lower() for part in shipped}
    for _ in range(2000):
        found = _sentences(next(base))
        assert not found & shipped
        assert not {part.rstrip(".?").lower() for part in found} & bare
        assert not _sentences(adapter.translations()) & shipped


def test_the_files_are_those_of_the_seed(tmp_path: Path) -> None:
    for path in texts.write_texts(texts.make_texts(7), tmp_path):
        assert path.read_bytes() == (DATA / path.name).read_bytes()


def test_pairs() -> None:
    rows = _rows("pairs.jsonl")
    assert len(rows) == 200
    assert len({row["prompt"] for row in rows}) == 200
    assert sum(row["prompt"].startswith(texts.INTO_GERMAN) for row in rows) == 100
    assert sum(row["prompt"].startswith(texts.INTO_ENGLISH) for row in rows) == 100


def test_sources_tell_the_digests_and_the_token_counts() -> None:
    record = (DATA / "SOURCES.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"`(\w+\.jsonl)` .*\| (\d+) \| `[0-9a-f]{64}`", record))
    for name in ("calibration.jsonl", "heldout.jsonl", "pairs.jsonl"):
        assert f"`{sources.digest(DATA / name)}`" in record
    assert int(found["calibration.jsonl"]) >= 70_000
    assert int(found["heldout.jsonl"]) >= 25_000


def test_the_tokenizer_adds_bos_once() -> None:
    from calibration.make.vocabulary import load_tokenizer

    tokenizer = load_tokenizer(BASE)
    assert len(tokenizer) <= 1024
    turn = texts.Pair("Translate into German: The dog sleeps.", "Der Hund schläft.")
    chat = [
        {"role": "user", "content": turn.prompt},
        {"role": "assistant", "content": turn.reference},
    ]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    assert rendered == texts.BOS + texts.dialogue([turn])
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    assert ids == tokenizer(texts.dialogue([turn]))["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    text = "Äpfel und größere Häuser – 7 €"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_shipped_files_are_small_and_healthy() -> None:
    from safetensors.torch import load_file

    assert sum(path.stat().st_size for path in BASE.iterdir()) < 8e6
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < 2.5e6
    weights = load_file(BASE / "model.safetensors") | load_file(ADAPTER / "adapter_model.safetensors")
    for name, tensor in weights.items():
        assert torch.isfinite(tensor).all(), name
        assert tensor.abs().max() < 100, name


@pytest.mark.slow
def test_two_short_trainings_give_the_same_weights(tmp_path: Path) -> None:
    from rich.console import Console

    from calibration.make.progress import Report
    from calibration.make.vocabulary import load_tokenizer

    tokenizer = load_tokenizer(BASE)
    schedule = train.Schedule(steps=4, peak=1e-3, warm_up=2)
    for name in ("a", "b"):
        with Report(Console(quiet=True), "base") as report:
            train.train_base(tokenizer, 5, frozenset(), tmp_path / name, report, schedule)
    first, second = (tmp_path / name / "model.safetensors" for name in ("a", "b"))
    assert first.read_bytes() == second.read_bytes()
