"""The words of both languages, as tables, and the readers of these tables."""

from __future__ import annotations

from typing import Literal, cast

from .trees import (
    Adjective,
    Adverb,
    Conjunction,
    Frame,
    Gender,
    Modal,
    Name,
    Noun,
    Preposition,
    Verb,
)

# class, English singular and plural, gender (w: weak declension), German singular and plural
_NOUNS = """
person man men m Mann Männer
person woman women f Frau Frauen
person boy boys mw Junge Jungen
person girl girls n Mädchen Mädchen
person child children n Kind Kinder
person friend friends m Freund Freunde
person neighbour neighbours mw Nachbar Nachbarn
person guest guests m Gast Gäste
person king kings m König Könige
person queen queens f Königin Königinnen
person princess princesses f Prinzessin Prinzessinnen
person thief thieves m Dieb Diebe
profession teacher teachers m Lehrer Lehrer
profession doctor doctors m Arzt Ärzte
profession student students mw Student Studenten
profession baker bakers m Bäcker Bäcker
profession farmer farmers mw Bauer Bauern
profession cook cooks m Koch Köche
profession policeman policemen mw Polizist Polizisten
profession painter painters m Maler Maler
profession waitress waitresses f Kellnerin Kellnerinnen
profession actress actresses f Schauspielerin Schauspielerinnen
profession nurse nurses f Krankenschwester Krankenschwestern
profession gardener gardeners m Gärtner Gärtner
family mother mothers f Mutter Mütter
family father fathers m Vater Väter
family sister sisters f Schwester Schwestern
family brother brothers m Bruder Brüder
family daughter daughters f Tochter Töchter
family son sons m Sohn Söhne
family aunt aunts f Tante Tanten
family uncle uncles m Onkel Onkel
family grandmother grandmothers f Großmutter Großmütter
family grandfather grandfathers m Großvater Großväter
animal dog dogs m Hund Hunde
animal cat cats f Katze Katzen
animal horse horses n Pferd Pferde
animal cow cows f Kuh Kühe
animal pig pigs n Schwein Schweine
animal bird birds m Vogel Vögel
animal mouse mice f Maus Mäuse
animal bear bears mw Bär Bären
animal rabbit rabbits n Kaninchen Kaninchen
animal goat goats f Ziege Ziegen
animal fox foxes m Fuchs Füchse
animal lion lions mw Löwe Löwen
animal duck ducks f Ente Enten
food bread - n Brot -
food cheese - m Käse -
food soup soups f Suppe Suppen
food apple apples m Apfel Äpfel
food cake cakes m Kuchen Kuchen
food egg eggs n Ei Eier
food meat - n Fleisch -
food fish - m Fisch -
food potato potatoes f Kartoffel Kartoffeln
food pear pears f Birne Birnen
food tomato tomatoes f Tomate Tomaten
food banana bananas f Banane Bananen
food rice - m Reis -
food salad salads m Salat Salate
drink water - n Wasser -
drink milk - f Milch -
drink coffee - m Kaffee -
drink tea - m Tee -
drink juice - m Saft -
drink wine - m Wein -
drink beer - n Bier -
text book books n Buch Bücher
text letter letters m Brief Briefe
text newspaper newspapers f Zeitung Zeitungen
text story stories f Geschichte Geschichten
text poem poems n Gedicht Gedichte
text postcard postcards f Postkarte Postkarten
thing key keys m Schlüssel Schlüssel
thing ball balls m Ball Bälle
thing knife knives n Messer Messer
thing glass glasses n Glas Gläser
thing cup cups f Tasse Tassen
thing plate plates m Teller Teller
thing lamp lamps f Lampe Lampen
thing clock clocks f Uhr Uhren
thing bag bags f Tasche Taschen
thing box boxes f Schachtel Schachteln
thing phone phones n Telefon Telefone
thing camera cameras f Kamera Kameras
thing picture pictures n Bild Bilder
thing flower flowers f Blume Blumen
thing gift gifts n Geschenk Geschenke
thing toy toys n Spielzeug Spielzeuge
thing pencil pencils m Bleistift Bleistifte
thing umbrella umbrellas m Regenschirm Regenschirme
thing ring rings m Ring Ringe
thing coin coins f Münze Münzen
thing map maps f Karte Karten
thing guitar guitars f Gitarre Gitarren
clothes shirt shirts n Hemd Hemden
clothes dress dresses n Kleid Kleider
clothes coat coats m Mantel Mäntel
clothes hat hats m Hut Hüte
clothes shoe shoes m Schuh Schuhe
clothes jacket jackets f Jacke Jacken
clothes skirt skirts m Rock Röcke
clothes scarf scarves m Schal Schals
vehicle car cars n Auto Autos
vehicle bicycle bicycles n Fahrrad Fahrräder
vehicle bus buses m Bus Busse
vehicle train trains m Zug Züge
vehicle ship ships n Schiff Schiffe
vehicle boat boats n Boot Boote
vehicle plane planes n Flugzeug Flugzeuge
furniture table tables m Tisch Tische
furniture chair chairs m Stuhl Stühle
furniture bed beds n Bett Betten
furniture sofa sofas n Sofa Sofas
furniture bench benches f Bank Bänke
opening door doors f Tür Türen
opening window windows n Fenster Fenster
opening cupboard cupboards m Schrank Schränke
opening suitcase suitcases m Koffer Koffer
room kitchen kitchens f Küche Küchen
room bedroom bedrooms n Schlafzimmer Schlafzimmer
room bathroom bathrooms n Badezimmer Badezimmer
room cellar cellars m Keller Keller
building house houses n Haus Häuser
building school schools f Schule Schulen
building hospital hospitals n Krankenhaus Krankenhäuser
building church churches f Kirche Kirchen
building hotel hotels n Hotel Hotels
building restaurant restaurants n Restaurant Restaurants
building shop shops m Laden Läden
building museum museums n Museum Museen
building library libraries f Bibliothek Bibliotheken
building office offices n Büro Büros
building castle castles n Schloss Schlösser
building bakery bakeries f Bäckerei Bäckereien
building factory factories f Fabrik Fabriken
building theatre theatres n Theater Theater
outside garden gardens m Garten Gärten
outside park parks m Park Parks
outside forest forests m Wald Wälder
outside village villages n Dorf Dörfer
outside city cities f Stadt Städte
outside harbour harbours m Hafen Häfen
outside valley valleys n Tal Täler
surface street streets f Straße Straßen
surface bridge bridges f Brücke Brücken
surface mountain mountains m Berg Berge
surface meadow meadows f Wiese Wiesen
surface field fields n Feld Felder
surface island islands f Insel Inseln
surface market markets m Markt Märkte
water river rivers m Fluss Flüsse
water lake lakes m See Seen
plant tree trees m Baum Bäume
plant rose roses f Rose Rosen
event concert concerts n Konzert Konzerte
event party parties f Feier Feiern
event lesson lessons m Unterricht -
event film films m Film Filme
event holiday holidays m Urlaub -
event game games n Spiel Spiele
event journey journeys f Reise Reisen
weather storm storms m Sturm Stürme
weather rain - m Regen -
weather snow - m Schnee -
"""

_HUMAN = "person profession family"
_PLACES = "room building outside surface"
_GOODS = "thing text clothes"

# English, German, classes, German stem or "=", comparatives or "-"
_ADJECTIVES = """
old|alt|H animal building thing vehicle furniture clothes text|=|older älter
young|jung|H animal plant|=|younger jünger
big|groß|animal building furniture room outside vehicle opening plant|=|bigger größer
small|klein|animal building furniture room outside vehicle thing opening|=|smaller kleiner
slim|schlank|H|=|slimmer schlanker
beautiful|schön|thing clothes building outside surface water plant|=|-
ugly|hässlich|clothes building furniture|=|uglier hässlicher
good|gut|food drink text H event|=|better besser
bad|schlecht|food text event|=|worse schlechter
new|neu|thing vehicle clothes furniture text building|=|newer neuer
red|rot|vehicle clothes thing opening furniture|=|-
blue|blau|vehicle clothes thing opening|=|-
green|grün|vehicle clothes furniture meadow|=|-
yellow|gelb|clothes thing furniture|=|-
black|schwarz|animal clothes vehicle|=|-
white|weiß|animal clothes furniture|=|-
brown|braun|animal furniture clothes|=|-
grey|grau|animal clothes vehicle|=|-
friendly|freundlich|H|=|friendlier freundlicher
nice|nett|H|=|nicer netter
happy|glücklich|H|=|happier glücklicher
sad|traurig|H animal text|=|sadder trauriger
tired|müde|H animal|müd|-
hungry|hungrig|H animal|=|hungrier hungriger
sick|krank|H animal|=|-
healthy|gesund|H animal food|=|healthier gesünder
strong|stark|H animal drink weather|=|stronger stärker
weak|schwach|H animal|=|weaker schwächer
fast|schnell|animal vehicle|=|faster schneller
slow|langsam|animal vehicle|=|slower langsamer
clever|klug|H animal|=|cleverer klüger
lazy|faul|H animal|=|lazier fauler
brave|mutig|H|=|braver mutiger
famous|berühmt|profession text building|=|-
rich|reich|H|=|richer reicher
poor|arm|H|=|poorer ärmer
polite|höflich|H|=|-
curious|neugierig|H animal|=|-
quiet|ruhig|H animal room outside surface|=|quieter ruhiger
loud|laut|event vehicle|=|louder lauter
warm|warm|food clothes room|=|warmer wärmer
cold|kalt|drink room water|=|colder kälter
hot|heiß|food drink|=|hotter heißer
fresh|frisch|food drink|=|fresher frischer
sweet|süß|food drink|=|sweeter süßer
expensive|teuer|thing clothes vehicle furniture|teur|-
cheap|billig|thing clothes vehicle furniture|=|cheaper billiger
heavy|schwer|furniture opening|=|heavier schwerer
light|leicht|clothes|=|lighter leichter
long|lang|text event|=|longer länger
short|kurz|text event|=|shorter kürzer
dark|dunkel|room outside|dunkl|-
bright|hell|room|=|brighter heller
clean|sauber|room clothes thing|=|cleaner sauberer
dirty|schmutzig|room clothes vehicle|=|dirtier schmutziger
empty|leer|room building opening|=|-
dangerous|gefährlich|animal weather surface|=|-
important|wichtig|text event|=|-
interesting|interessant|text event building|=|-
boring|langweilig|text event|=|-
funny|lustig|H text animal|=|funnier lustiger
wonderful|wunderbar|event food text|=|-
high|hoch|building|hoh|higher höher
narrow|schmal|opening|=|narrower schmaler
"""

# English, past, participle | German (prefix+stem), er form, past, participle, h or s |
# subjects | frame | p: takes a place
_VERBS = """
rain rained rained|regnen regnet regnete geregnet h|sky|none|-
snow snowed snowed|schneien schneit schneite geschneit h|sky|none|-
sleep slept slept|schlafen schläft schlief geschlafen h|H animal|none|p
work worked worked|arbeiten arbeitet arbeitete gearbeitet h|H|none|p
laugh laughed laughed|lachen lacht lachte gelacht h|H|none|-
cry cried cried|weinen weint weinte geweint h|H|none|p
dance danced danced|tanzen tanzt tanzte getanzt h|H|none|p
sing sang sung|singen singt sang gesungen h|H|none|p
play played played|spielen spielt spielte gespielt h|H animal|none|p
sit sat sat|sitzen sitzt saß gesessen h|H animal|none|p
stand stood stood|stehen steht stand gestanden h|H animal|none|p
live lived lived|wohnen wohnt wohnte gewohnt h|H|none|p
smile smiled smiled|lächeln lächelt lächelte gelächelt h|H|none|-
learn learned learned|lernen lernt lernte gelernt h|H|none|p
get_up got_up got_up|auf+stehen steht stand aufgestanden s|H|none|-
fall_asleep fell_asleep fallen_asleep|ein+schlafen schläft schlief eingeschlafen s|H animal|none|p
arrive arrived arrived|an+kommen kommt kam angekommen s|H vehicle|none|-
vanish vanished vanished|verschwinden verschwindet verschwand verschwunden s|H animal|none|p
begin began begun|beginnen beginnt begann begonnen h|event|none|-
eat ate eaten|essen isst aß gegessen h|H animal|acc food|p
drink drank drunk|trinken trinkt trank getrunken h|H|acc drink|p
cook cooked cooked|kochen kocht kochte gekocht h|H|acc food|p
buy bought bought|kaufen kauft kaufte gekauft h|H|acc food drink G vehicle furniture|p
sell sold sold|verkaufen verkauft verkaufte verkauft h|H|acc G vehicle furniture food|p
see saw seen|sehen sieht sah gesehen h|H animal|acc H animal vehicle thing plant|p
hear heard heard|hören hört hörte gehört h|H animal|acc H animal|p
find found found|finden findet fand gefunden h|H|acc G animal|p
lose lost lost|verlieren verliert verlor verloren h|H|acc G|p
read read read|lesen liest las gelesen h|H|acc text|p
write wrote written|schreiben schreibt schrieb geschrieben h|H|acc text|p
open opened opened|öffnen öffnet öffnete geöffnet h|H|acc opening|-
close closed closed|schließen schließt schloss geschlossen h|H|acc opening|-
repair repaired repaired|reparieren repariert reparierte repariert h|H|acc vehicle furniture|p
wash washed washed|waschen wäscht wusch gewaschen h|H|acc clothes vehicle|p
wear wore worn|tragen trägt trug getragen h|H|acc clothes|-
take took taken|nehmen nimmt nahm genommen h|H|acc G|-
need needed needed|brauchen braucht brauchte gebraucht h|H|acc G vehicle furniture|-
love loved loved|lieben liebt liebte geliebt h|H|acc H animal|-
know knew known|kennen kennt kannte gekannt h|H|acc H building outside text|-
visit visited visited|besuchen besucht besuchte besucht h|H|acc H building outside|-
invite invited invited|ein+laden lädt lud eingeladen h|H|acc H|-
meet met met|treffen trifft traf getroffen h|H|acc H|p
call called called|an+rufen ruft rief angerufen h|H|acc H|-
look_for looked_for looked_for|suchen sucht suchte gesucht h|H animal|acc G animal|p
draw drew drawn|zeichnen zeichnet zeichnete gezeichnet h|H|acc animal plant building|-
paint painted painted|malen malt malte gemalt h|H|acc animal plant building|-
build built built|bauen baut baute gebaut h|H|acc building vehicle furniture|-
break broke broken|zerbrechen zerbricht zerbrach zerbrochen h|H|acc thing|-
forget forgot forgotten|vergessen vergisst vergaß vergessen h|H|acc G|-
clean cleaned cleaned|putzen putzt putzte geputzt h|H|acc room opening clothes|-
admire admired admired|bewundern bewundert bewunderte bewundert h|H|acc H animal building plant|p
hide hid hidden|verstecken versteckt versteckte versteckt h|H animal|acc G|p
pay_for paid_for paid_for|bezahlen bezahlt bezahlte bezahlt h|H|acc food drink|-
steal stole stolen|stehlen stiehlt stahl gestohlen h|H|acc G vehicle|-
cut cut cut|schneiden schneidet schnitt geschnitten h|H|acc food|-
bake baked baked|backen backt backte gebacken h|H|acc food|-
feed fed fed|füttern füttert fütterte gefüttert h|H|acc animal|p
catch caught caught|fangen fängt fing gefangen h|H animal|acc animal|p
watch watched watched|beobachten beobachtet beobachtete beobachtet h|H animal|acc H animal|p
look_at looked_at looked_at|an+sehen sieht sah angesehen h|H|acc H text thing|-
help helped helped|helfen hilft half geholfen h|H|dat H|p
thank thanked thanked|danken dankt dankte gedankt h|H|dat H|-
answer answered answered|antworten antwortet antwortete geantwortet h|H|dat H|-
follow followed followed|folgen folgt folgte gefolgt s|H animal|dat H animal|-
listen_to listened_to listened_to|zu+hören hört hörte zugehört h|H|dat H|-
trust trusted trusted|vertrauen vertraut vertraute vertraut h|H animal|dat H|-
give gave given|geben gibt gab gegeben h|H|give G food|-
show showed shown|zeigen zeigt zeigte gezeigt h|H|give G|-
send sent sent|schicken schickt schickte geschickt h|H|give text|-
lend lent lent|leihen leiht lieh geliehen h|H|give G vehicle|-
bring brought brought|bringen bringt brachte gebracht h|H|give G food drink|-
tell told told|erzählen erzählt erzählte erzählt h|H|give text|-
wait waited waited|warten wartet wartete gewartet h|H animal|prep for:auf:acc H vehicle|p
think thought thought|denken denkt dachte gedacht h|H|prep of:an:acc H event|-
speak spoke spoken|sprechen spricht sprach gesprochen h|H|prep with:mit:dat H|p
dream dreamed dreamed|träumen träumt träumte geträumt h|H animal|prep of:von:dat H animal food|-
ask asked asked|fragen fragt fragte gefragt h|H|prep about:nach:dat H|-
go went gone|gehen geht ging gegangen s|H animal|motion|-
drive drove driven|fahren fährt fuhr gefahren s|H|motion|-
run ran run|laufen läuft lief gelaufen s|H animal|motion|-
travel travelled travelled|reisen reist reiste gereist s|H|motion|-
hurry hurried hurried|eilen eilt eilte geeilt s|H|motion|-
come came come|kommen kommt kam gekommen s|H animal|motion|-
return returned returned|zurück+kehren kehrt kehrte zurückgekehrt s|H|motion|-
know knew known|wissen weiß wusste gewusst h|H|that|-
say said said|sagen sagt sagte gesagt h|H|that|-
believe believed believed|glauben glaubt glaubte geglaubt h|H|that|-
hope hoped hoped|hoffen hofft hoffte gehofft h|H|that|-
see saw seen|sehen sieht sah gesehen h|H|that|-
"""


def _kinds(text: str) -> frozenset[str]:
    short = {"H": _HUMAN, "G": _GOODS, "P": _PLACES}
    return frozenset(word for part in text.split() for word in short.get(part, part).split())


def _nouns() -> tuple[Noun, ...]:
    found = []
    for line in _NOUNS.split("\n"):
        if line:
            kind, en, en_plural, gender, de, de_plural = line.split()
            if de_plural == "-":
                en_plural = "-"
            weak = gender.endswith("w")
            found.append(Noun(kind, en, en_plural, cast(Gender, gender[0]), de, de_plural, weak))
    return tuple(found)


def _adjectives() -> tuple[Adjective, ...]:
    found = []
    for line in _ADJECTIVES.strip().split("\n"):
        en, de, kinds, stem, comparative = line.split("|")
        en_more, de_more = ("", "") if comparative == "-" else comparative.split()
        stem = de if stem == "=" else stem
        found.append(Adjective(en, de, _kinds(kinds), stem, en_more, de_more))
    return tuple(found)


def _frame(text: str) -> Frame:
    shape, _, rest = text.partition(" ")
    preposition = None
    if shape == "prep":
        words, _, rest = rest.partition(" ")
        en, de, case = words.split(":")
        preposition = Preposition(en, de, cast(Literal["acc", "dat"], case))
    known = cast(Literal["none", "acc", "dat", "give", "prep", "motion", "that"], shape)
    return Frame(known, _kinds(rest), preposition)


def _verbs() -> tuple[Verb, ...]:
    found = []
    for line in _VERBS.strip().split("\n"):
        english, german, subjects, frame, place = line.split("|")
        en, en_past, en_participle = (form.replace("_", " ") for form in english.split())
        infinitive, er, past, participle, auxiliary = german.split()
        prefix, plus, stem = infinitive.partition("+")
        found.append(
            Verb(
                en,
                en_past,
                en_participle,
                stem if plus else infinitive,
                er,
                past,
                participle,
                prefix if plus else "",
                "sein" if auxiliary == "s" else "haben",
                _kinds(subjects),
                _frame(frame),
                place == "p",
            )
        )
    return tuple(found)


NOUNS = _nouns()
ADJECTIVES = _adjectives()
VERBS = _verbs()

MODALS = (
    Modal("can", "could", ("kann", "kannst", "kann", "können"), "konnte"),
    Modal("must", "had to", ("muss", "musst", "muss", "müssen"), "musste"),
    Modal("want to", "wanted to", ("will", "willst", "will", "wollen"), "wollte"),
    Modal("should", "", ("soll", "sollst", "soll", "sollen"), ""),
    Modal("may", "", ("darf", "darfst", "darf", "dürfen"), ""),
)

NAMES = tuple(
    Name(text, gender)
    for gender, names in (
        ("f", "Anna Maria Lisa Julia Emma Clara Sophie Laura Nina Ida Helga Rosa"),
        ("m", "Peter Paul Max Tom Jonas Felix Karl Otto David Simon Emil Hugo"),
    )
    for text in names.split()
    for gender in (cast(Gender, gender),)
)
_CITIES = "Berlin Hamburg London Paris Dresden Bremen Madrid Oslo Leipzig Boston"
CITIES = tuple(Name(text, "n") for text in _CITIES.split())

PRESENT_TIMES = (
    Adverb("today", "heute"),
    Adverb("now", "jetzt"),
    Adverb("every day", "jeden Tag"),
    Adverb("in the morning", "am Morgen"),
    Adverb("in the evening", "am Abend"),
    Adverb("at night", "in der Nacht"),
    Adverb("on Monday", "am Montag"),
    Adverb("on Friday", "am Freitag"),
    Adverb("on Sunday", "am Sonntag"),
    Adverb("in summer", "im Sommer"),
    Adverb("in winter", "im Winter"),
)
PAST_TIMES = (
    Adverb("yesterday", "gestern"),
    Adverb("last week", "letzte Woche"),
    Adverb("last year", "letztes Jahr"),
    Adverb("two days ago", "vor zwei Tagen"),
    Adverb("in the evening", "am Abend"),
    Adverb("in the morning", "am Morgen"),
    Adverb("on Monday", "am Montag"),
    Adverb("at first", "zuerst"),
    Adverb("in the end", "am Ende"),
)
FUTURE_TIMES = (
    Adverb("tomorrow", "morgen"),
    Adverb("soon", "bald"),
    Adverb("next week", "nächste Woche"),
    Adverb("next year", "nächstes Jahr"),
    Adverb("on Friday", "am Freitag"),
    Adverb("later", "später"),
)
FREQUENCIES = (
    Adverb("often", "oft"),
    Adverb("always", "immer"),
    Adverb("never", "nie"),
    Adverb("sometimes", "manchmal"),
    Adverb("seldom", "selten"),
)
MANNERS = (
    Adverb("quickly", "schnell"),
    Adverb("slowly", "langsam"),
    Adverb("quietly", "leise"),
    Adverb("gladly", "gern"),
)
TOGETHER = Adverb("together", "zusammen")
ALONE = Adverb("alone", "allein")
DEGREES = (
    Adverb("very", "sehr"),
    Adverb("too", "zu"),
    Adverb("a little", "ein wenig"),
    Adverb("rather", "ziemlich"),
)

IN = Preposition("in", "in", "dat")
ON = Preposition("on", "auf", "dat")
BY = Preposition("at", "an", "dat")
NEAR = Preposition("next to", "neben", "dat")
BEHIND = Preposition("behind", "hinter", "dat")
IN_FRONT = Preposition("in front of", "vor", "dat")
UNDER = Preposition("under", "unter", "dat")
INTO = Preposition("into", "in", "acc")
TO = Preposition("to", "zu", "dat")
TO_CITY = Preposition("to", "nach", "dat")
FROM = Preposition("out of", "aus", "dat")
WITH = Preposition("with", "mit", "dat")
WITHOUT = Preposition("without", "ohne", "acc")
FOR = Preposition("for", "für", "acc")
DURING = Preposition("during", "während", "gen")
DESPITE = Preposition("despite", "trotz", "gen")

BECAUSE = Conjunction("because", "weil", True)
THAT = Conjunction("that", "dass", True)
IF = Conjunction("if", "wenn", True)
ALTHOUGH = Conjunction("although", "obwohl", True)
WHILE = Conjunction("while", "während", True)
BEFORE = Conjunction("before", "bevor", True)
AND = Conjunction("and", "und", False)
BUT = Conjunction("but", "aber", False)

EN_NUMBERS = ("", "", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DE_NUMBERS = ("", "", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn")


def noun(en: str) -> Noun:
    """The noun with this English singular; KeyError when the lexicon lacks it."""
    return _BY_ENGLISH[en]


def verb(de: str) -> Verb:
    """The first verb with this German infinitive (prefix included)."""
    return next(item for item in VERBS if item.de_infinitive == de)


def adjective(en: str) -> Adjective:
    """The adjective with this English form."""
    return next(item for item in ADJECTIVES if item.en == en)


_BY_ENGLISH = {item.en: item for item in NOUNS}
