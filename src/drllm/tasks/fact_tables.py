"""The tables behind `builtin_facts`: what a table is, and the facts of science and numbers.

Owns the form of a relation and the list of all of them; `fact_tables_life` and
`fact_tables_places` hold the others. Leaves distractors, splits and order to `builtin_facts`.
Written for this project. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Relation:
    """One kind of fact. Distractors are other answers of the same relation.

    Attributes:
        name: Short; part of the question's id and of the fact's identity.
        facts: Subject → answer.
        forward: Wordings that give the subject (`{subject}`) and ask for the answer.
        backward: Wordings that give the answer (`{answer}`) and ask for the subject; only where
            no two subjects share an answer.
        also: Subject → other answers of the table that are right or arguable for it. They are
            never its distractors, nor is the subject a distractor for them.
    """

    name: str
    facts: Mapping[str, str]
    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()
    also: Mapping[str, frozenset[str]] = field(default_factory=dict)


def table(text: str) -> dict[str, str]:
    """Read `subject = answer` entries, separated by semicolons or line ends.

    Raises:
        ValueError: An entry without an answer, or a subject that stands twice.

    Example:
        >>> table("cow = calf; horse = foal")
        {'cow': 'calf', 'horse': 'foal'}
    """
    facts: dict[str, str] = {}
    for entry in text.replace("\n", ";").split(";"):
        if entry.strip():
            subject, answer = (side.strip() for side in entry.split("="))
            if subject in facts:
                raise ValueError(f"{subject!r} stands twice in a table")
            facts[subject] = answer
    return facts


def exceptions(text: str) -> dict[str, frozenset[str]]:
    """Read `subject = answer, answer` entries for `Relation.also`.

    Example:
        >>> exceptions("goose = chick")
        {'goose': frozenset({'chick'})}
    """
    return {
        subject: frozenset(answer.strip() for answer in answers.split(","))
        for subject, answers in table(text).items()
    }


SCIENCE = (
    Relation(
        name="symbol",
        facts=table("""
            hydrogen = H; helium = He; lithium = Li; beryllium = Be; boron = B; carbon = C
            nitrogen = N; oxygen = O; fluorine = F; neon = Ne; sodium = Na; magnesium = Mg
            aluminium = Al; silicon = Si; phosphorus = P; sulfur = S; chlorine = Cl; argon = Ar
            potassium = K; calcium = Ca; titanium = Ti; chromium = Cr; manganese = Mn; iron = Fe
            cobalt = Co; nickel = Ni; copper = Cu; zinc = Zn; arsenic = As; bromine = Br
            krypton = Kr; silver = Ag; tin = Sn; iodine = I; xenon = Xe; barium = Ba; tungsten = W
            platinum = Pt; gold = Au; mercury = Hg; lead = Pb; radon = Rn; uranium = U
        """),
        forward=(
            "What is the chemical symbol for {subject}?",
            "Which symbol stands for {subject} in the periodic table?",
        ),
        backward=(
            "Which element has the chemical symbol {answer}?",
            "In the periodic table, {answer} is the symbol for which element?",
        ),
    ),
    Relation(
        name="atomic number",
        facts=table("""
            hydrogen = 1; helium = 2; lithium = 3; beryllium = 4; boron = 5; carbon = 6
            nitrogen = 7; oxygen = 8; fluorine = 9; neon = 10; sodium = 11; magnesium = 12
        """),
        forward=(
            "What is the atomic number of {subject}?",
            "How many protons does an atom of {subject} have?",
        ),
    ),
    Relation(
        name="formula",
        facts=table("""
            water = H2O; carbon dioxide = CO2; table salt = NaCl; methane = CH4; ammonia = NH3
            ozone = O3; carbon monoxide = CO; hydrochloric acid = HCl; sulfuric acid = H2SO4
            hydrogen peroxide = H2O2; nitric acid = HNO3; glucose = C6H12O6; propane = C3H8
        """),
        forward=(
            "What is the chemical formula of {subject}?",
            "How is {subject} written as a chemical formula?",
        ),
        backward=("Which substance has the chemical formula {answer}?",),
    ),
    Relation(
        name="unit",
        facts=table("""
            force = newton; pressure = pascal; energy = joule; power = watt
            electric current = ampere; voltage = volt; electrical resistance = ohm
            frequency = hertz; temperature = kelvin; mass = kilogram; length = metre
            time = second; electric charge = coulomb; capacitance = farad
            the amount of a substance = mole; luminous intensity = candela; inductance = henry
            magnetic flux = weber; magnetic flux density = tesla; radioactivity = becquerel
        """),
        forward=(
            "What is the SI unit of {subject}?",
            "In which unit does science measure {subject}?",
        ),
        backward=("The {answer} is the unit of which quantity?",),
    ),
    Relation(
        name="instrument",
        facts=table("""
            temperature = thermometer; air pressure = barometer; wind speed = anemometer
            earthquakes = seismograph; humidity = hygrometer; electric current = ammeter
            voltage = voltmeter; the speed of a car = speedometer; angles = protractor
            the distance a car has driven = odometer; altitude = altimeter
            radioactivity = Geiger counter; the number of steps walked = pedometer
            the time of day = clock; the weight of a person = scale
        """),
        forward=(
            "Which instrument measures {subject}?",
            "What is used to measure {subject}?",
        ),
        backward=("Which of these does the {answer} measure?",),
    ),
    Relation(
        name="planet",
        facts=table("""
            is the closest to the Sun = Mercury; has the hottest surface = Venus
            is known as the Red Planet = Mars; is the largest = Jupiter
            has the Great Red Spot = Jupiter; is best known for its bright rings = Saturn
            spins tilted almost on its side = Uranus; is the farthest from the Sun = Neptune
            has the moon Titan = Saturn; has the moons Phobos and Deimos = Mars
            has the moon Triton = Neptune; has the moon Europa = Jupiter
            has the volcano Olympus Mons = Mars; is the third from the Sun = Earth
            has the shortest year = Mercury
        """),
        forward=(
            "Which planet of the solar system {subject}?",
            "What is the name of the planet that {subject}?",
        ),
    ),
    Relation(
        name="stone",
        facts=table("""
            granite = igneous rock; basalt = igneous rock; obsidian = igneous rock
            pumice = igneous rock; sandstone = sedimentary rock; limestone = sedimentary rock
            shale = sedimentary rock; chalk = sedimentary rock; marble = metamorphic rock
            slate = metamorphic rock; gneiss = metamorphic rock; bronze = alloy; brass = alloy
            steel = alloy; pewter = alloy
        """),
        forward=("What kind of material is {subject}?", "{subject} is an example of what?"),
    ),
)

NUMBERS = (
    Relation(
        name="amount",
        facts=table("""
            seconds are in a minute = 60; days are in a week = 7; hours are in a day = 24
            months are in a year = 12; days are in a common year = 365
            days are in a leap year = 366; years are in a decade = 10; years are in a century = 100
            years are in a millennium = 1000; minutes are in half an hour = 30
            minutes are in a quarter of an hour = 15; seconds are in an hour = 3600
            hours are in two days = 48; feet are in a yard = 3; inches are in a yard = 36
            pounds are in a stone = 14; ounces are in a pound = 16; feet are in a mile = 5280
            yards are in a mile = 1760; items are in a score = 20; items are in a gross = 144
            degrees are in a right angle = 90; degrees are in a full circle = 360
            degrees do the angles of a triangle add up to = 180; squares are on a chessboard = 64
            cards are in a standard deck without jokers = 52; keys does a modern piano have = 88
            players does a soccer team have on the field = 11
            players does a basketball team have on the court = 5
            legs does an insect have = 6; legs does a spider have = 8
            wheels does a bicycle have = 2; strings does a violin have = 4
            bones are in the body of an adult human = 206
            letters are in the English alphabet = 26; centimetres are in a quarter of a metre = 25
        """),
        forward=("How many {subject}?", "Exactly how many {subject}?"),
    ),
    Relation(
        name="sides",
        facts=table("""
            triangle = 3; pentagon = 5; hexagon = 6; heptagon = 7; octagon = 8; nonagon = 9
            decagon = 10; dodecagon = 12; quadrilateral = 4
        """),
        forward=(
            "How many sides does every {subject} have?",
            "How many corners has each {subject}?",
        ),
        backward=("Which polygon has {answer} sides?",),
    ),
    Relation(
        name="roman numeral",
        facts=table("""
            IV = 4; V = 5; VI = 6; IX = 9; X = 10; XII = 12; XIV = 14; XV = 15; XX = 20; XL = 40
            L = 50; XC = 90; C = 100; D = 500; M = 1000
        """),
        forward=("Which number does the Roman numeral {subject} stand for?",),
        backward=("How is {answer} written in Roman numerals?",),
    ),
    Relation(
        name="next month",
        facts=table("""
            January = February; February = March; March = April; April = May; May = June
            June = July; July = August; August = September; September = October
            October = November; November = December; December = January
        """),
        forward=("Which month comes right after {subject}?", "Which month follows {subject}?"),
        backward=("Which month comes right before {answer}?",),
    ),
    Relation(
        name="month number",
        facts=table("""
            first = January; second = February; third = March; fourth = April; fifth = May
            sixth = June; seventh = July; eighth = August; ninth = September; tenth = October
            eleventh = November; twelfth = December
        """),
        forward=("Which month is the {subject} of the year?",),
    ),
    Relation(
        name="next day",
        facts=table("""
            Monday = Tuesday; Tuesday = Wednesday; Wednesday = Thursday; Thursday = Friday
            Friday = Saturday; Saturday = Sunday; Sunday = Monday
        """),
        forward=("Which day comes right after {subject}?", "Today is {subject}. What is tomorrow?"),
        backward=("Which day comes right before {answer}?",),
    ),
    Relation(
        name="holiday",
        facts=table("""
            Christmas Day = December; Halloween = October; New Year's Day = January
            Valentine's Day = February; American Independence Day = July; Bastille Day = July
            Saint Patrick's Day = March; April Fools' Day = April
            Thanksgiving in the USA = November; Labor Day in the USA = September
            Groundhog Day = February; Boxing Day = December
            International Workers' Day = May; Martin Luther King Day = January
            Columbus Day = October; International Women's Day = March; Earth Day = April
            Veterans Day = November
        """),
        forward=("In which month is {subject}?", "{subject} falls in which month?"),
    ),
)
