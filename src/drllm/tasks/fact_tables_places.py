"""The tables of `builtin_facts` on countries, cities, sights, and works of art and invention.

Owns these facts and their wordings; `fact_tables` says what a relation is. Countries whose
capital or continent is disputed or divided are left out. Written for this project.
Loads no torch.
"""

from __future__ import annotations

from drllm.tasks.fact_tables import Relation, exceptions, table

PLACES = (
    Relation(
        name="capital",
        facts=table("""
            France = Paris; Germany = Berlin; Italy = Rome; Spain = Madrid; Portugal = Lisbon
            Greece = Athens; Austria = Vienna; Hungary = Budapest; Poland = Warsaw
            Norway = Oslo; Sweden = Stockholm; Finland = Helsinki; Denmark = Copenhagen
            Ireland = Dublin; Iceland = Reykjavik; Belgium = Brussels
            Romania = Bucharest; Bulgaria = Sofia; Croatia = Zagreb; Serbia = Belgrade
            Ukraine = Kyiv; Russia = Moscow; Turkey = Ankara; Egypt = Cairo; Kenya = Nairobi
            Nigeria = Abuja; Ghana = Accra; Ethiopia = Addis Ababa; Morocco = Rabat
            Tunisia = Tunis; Senegal = Dakar; Uganda = Kampala; Zambia = Lusaka
            Iraq = Baghdad; Iran = Tehran; Saudi Arabia = Riyadh; Jordan = Amman
            Lebanon = Beirut; India = New Delhi; Pakistan = Islamabad; Nepal = Kathmandu
            Bangladesh = Dhaka; Thailand = Bangkok; Vietnam = Hanoi; Cambodia = Phnom Penh
            Japan = Tokyo; China = Beijing; South Korea = Seoul; Mongolia = Ulaanbaatar
            the Philippines = Manila; Australia = Canberra; New Zealand = Wellington
            Canada = Ottawa; Mexico = Mexico City; Cuba = Havana; Jamaica = Kingston
            Brazil = Brasilia; Argentina = Buenos Aires; Peru = Lima; Colombia = Bogota
            Venezuela = Caracas; Ecuador = Quito; Uruguay = Montevideo; Paraguay = Asuncion
        """),
        forward=("What is the capital of {subject}?", "Which city is the capital of {subject}?"),
    ),
    Relation(
        name="continent",
        facts=table("""
            France = Europe; Poland = Europe; Norway = Europe; Portugal = Europe
            Greece = Europe; Kenya = Africa; Nigeria = Africa; Morocco = Africa
            Ethiopia = Africa; Zambia = Africa; Senegal = Africa; Ghana = Africa; India = Asia
            Japan = Asia; Thailand = Asia; Nepal = Asia; Vietnam = Asia; Mongolia = Asia
            Canada = North America; Mexico = North America; Guatemala = North America
            Cuba = North America; Honduras = North America; Brazil = South America
            Peru = South America; Chile = South America; Paraguay = South America
            Uruguay = South America
        """),
        forward=("On which continent is {subject}?", "{subject} is a country in which continent?"),
    ),
    Relation(
        name="currency",
        facts=table("""
            Japan = yen; the United Kingdom = pound sterling; India = rupee; Russia = ruble
            Mexico = peso; China = yuan; Switzerland = franc; Sweden = krona; Brazil = real
            South Africa = rand; Turkey = lira; Israel = shekel; Thailand = baht; Poland = zloty
            South Korea = won; Vietnam = dong; Hungary = forint; Germany = euro
            the United States = dollar; Kenya = shilling; Saudi Arabia = riyal; Bangladesh = taka
            Nigeria = naira; Malaysia = ringgit; Peru = sol; Ukraine = hryvnia
        """),
        forward=(
            "What is the currency of {subject}?",
            "With which money do people pay in \
{subject}?",
        ),
        backward=("In which country do people pay with the {answer}?",),
    ),
    Relation(
        name="state capital",
        facts=table("""
            California = Sacramento; Texas = Austin; Florida = Tallahassee; New York = Albany
            Massachusetts = Boston; Georgia = Atlanta; Colorado = Denver; Arizona = Phoenix
            Hawaii = Honolulu; Alaska = Juneau; Ohio = Columbus; Tennessee = Nashville
            Oregon = Salem; Utah = Salt Lake City; Nevada = Carson City; Minnesota = Saint Paul
            Illinois = Springfield; Michigan = Lansing; Virginia = Richmond; Louisiana = Baton Rouge
            Washington = Olympia; Pennsylvania = Harrisburg; Kansas = Topeka; Iowa = Des Moines
            Maine = Augusta; Wisconsin = Madison; Idaho = Boise; Montana = Helena
        """),
        forward=("What is the capital of the US state of {subject}?",),
        backward=("{answer} is the capital of which US state?",),
    ),
    Relation(
        name="city",
        facts=table("""
            Milan = Italy; Barcelona = Spain; Munich = Germany; Marseille = France
            Manchester = England; Glasgow = Scotland; Krakow = Poland; Rotterdam = Netherlands
            Istanbul = Turkey; Saint Petersburg = Russia; Geneva = Switzerland
            Salzburg = Austria; Osaka = Japan; Shanghai = China; Mumbai = India
            Karachi = Pakistan; Sydney = Australia; Auckland = New Zealand; Toronto = Canada
            Chicago = United States; Rio de Janeiro = Brazil; Lagos = Nigeria
            Casablanca = Morocco; Johannesburg = South Africa; Alexandria = Egypt
            Guadalajara = Mexico; Porto = Portugal; Gothenburg = Sweden; Antwerp = Belgium
            Busan = South Korea
        """),
        forward=(
            "In which country is the city of {subject}?",
            "The city of {subject} belongs to which country?",
        ),
        also=exceptions("""
            Guadalajara = Spain; Lagos = Portugal; Sydney = Canada
            Alexandria = United States, Scotland; Manchester = United States
            Geneva = United States; Rotterdam = United States; Milan = United States
            Glasgow = United States; Saint Petersburg = United States
        """),
    ),
    Relation(
        name="sight",
        facts=table("""
            the Eiffel Tower = France; the Colosseum = Italy; the Great Pyramid of Giza = Egypt
            the Taj Mahal = India; the Great Wall = China; the Statue of Liberty = United States
            Machu Picchu = Peru; the Parthenon = Greece; Stonehenge = England; Petra = Jordan
            Angkor Wat = Cambodia; Mount Fuji = Japan; the Brandenburg Gate = Germany
            the Alhambra = Spain; Ayers Rock = Australia; Mount Kilimanjaro = Tanzania
            Table Mountain = South Africa; Chichen Itza = Mexico; the Moscow Kremlin = Russia
            the statue of Christ the Redeemer = Brazil; Hagia Sophia = Turkey
            the Burj Khalifa = United Arab Emirates; Blarney Castle = Ireland
            the statue of the Little Mermaid = Denmark; the Atomium = Belgium
        """),
        forward=("In which country is {subject}?", "Where would you go to visit {subject}?"),
    ),
)

CULTURE = (
    Relation(
        name="author",
        facts=table("""
            Hamlet = William Shakespeare; Oliver Twist = Charles Dickens
            Pride and Prejudice = Jane Austen; War and Peace = Leo Tolstoy
            Don Quixote = Miguel de Cervantes; Moby-Dick = Herman Melville
            Frankenstein = Mary Shelley; Dracula = Bram Stoker; The Odyssey = Homer
            The Divine Comedy = Dante Alighieri; Faust = Johann Wolfgang von Goethe
            Les Miserables = Victor Hugo; The Hobbit = J. R. R. Tolkien
            Nineteen Eighty-Four = George Orwell; Crime and Punishment = Fyodor Dostoevsky
            Robinson Crusoe = Daniel Defoe; Gulliver's Travels = Jonathan Swift
            Treasure Island = Robert Louis Stevenson; The Jungle Book = Rudyard Kipling
            The Time Machine = H. G. Wells; The Great Gatsby = F. Scott Fitzgerald
            Wuthering Heights = Emily Bronte; Jane Eyre = Charlotte Bronte
            Brave New World = Aldous Huxley; The Old Man and the Sea = Ernest Hemingway
            The Metamorphosis = Franz Kafka; Paradise Lost = John Milton
            The Canterbury Tales = Geoffrey Chaucer
        """),
        forward=("Who wrote '{subject}'?", "Who is the author of '{subject}'?"),
        backward=("Which of these works was written by {answer}?",),
    ),
    Relation(
        name="artist",
        facts=table("""
            Mona Lisa = Leonardo da Vinci; The Starry Night = Vincent van Gogh
            Guernica = Pablo Picasso; The Scream = Edvard Munch; The Night Watch = Rembrandt
            Girl with a Pearl Earring = Johannes Vermeer; The Kiss = Gustav Klimt
            The Persistence of Memory = Salvador Dali; The Birth of Venus = Sandro Botticelli
            Impression, Sunrise = Claude Monet; American Gothic = Grant Wood
            The School of Athens = Raphael
        """),
        forward=("Who painted '{subject}'?", "Which artist made the painting '{subject}'?"),
        also=exceptions("The Kiss = Edvard Munch; The Starry Night = Edvard Munch"),
    ),
    Relation(
        name="composer",
        facts=table("""
            The Magic Flute = Wolfgang Amadeus Mozart; The Four Seasons = Antonio Vivaldi
            Swan Lake = Pyotr Ilyich Tchaikovsky; Messiah = George Frideric Handel
            the Moonlight Sonata = Ludwig van Beethoven; Carmen = Georges Bizet
            Aida = Giuseppe Verdi; the Brandenburg Concertos = Johann Sebastian Bach
            Bolero = Maurice Ravel; The Rite of Spring = Igor Stravinsky
            Tosca = Giacomo Puccini; The Blue Danube = Johann Strauss II
        """),
        forward=("Who composed {subject}?", "Which composer wrote {subject}?"),
    ),
    Relation(
        name="inventor",
        facts=table("""
            invented the telephone = Alexander Graham Bell; invented dynamite = Alfred Nobel
            discovered penicillin = Alexander Fleming; discovered radium = Marie Curie
            discovered X-rays = Wilhelm Roentgen
            proposed the theory of relativity = Albert Einstein
            proposed evolution by natural selection = Charles Darwin
            formulated the law of universal gravitation = Isaac Newton
            arranged the elements in the periodic table = Dmitri Mendeleev
            flew the first powered aeroplane = the Wright brothers
            introduced printing with movable type to Europe = Johannes Gutenberg
            developed the first vaccine against smallpox = Edward Jenner
            invented a reading system for blind people = Louis Braille
            founded genetics by crossing peas = Gregor Mendel
            was the first to walk on the Moon = Neil Armstrong
            was the first human in space = Yuri Gagarin
            was the first president of the United States = George Washington
        """),
        forward=("Who {subject}?", "Who was it that {subject}?"),
    ),
    Relation(
        name="Greek god",
        facts=table("""
            the sea = Poseidon; war = Ares; love = Aphrodite; wisdom = Athena
            the underworld = Hades; wine = Dionysus; the hunt = Artemis; the harvest = Demeter
            victory = Nike; sleep = Hypnos
        """),
        forward=(
            "Which Greek deity ruled over {subject}?",
            "In Greek myth, who was the deity of {subject}?",
        ),
        also=exceptions("war = Athena"),
    ),
    Relation(
        name="dish",
        facts=table("""
            sushi = Japan; pizza = Italy; paella = Spain; tacos = Mexico; kimchi = South Korea
            ratatouille = France; moussaka = Greece; goulash = Hungary; pierogi = Poland
            pho = Vietnam; haggis = Scotland; borscht = Ukraine; pad thai = Thailand
            feijoada = Brazil; fondue = Switzerland; ceviche = Peru; couscous = Morocco
        """),
        forward=(
            "From which country does the food {subject} come?",
            "Which country is known for the food called {subject}?",
        ),
        also=exceptions("""
            fondue = France; moussaka = Morocco; borscht = Poland
            ceviche = Mexico; pierogi = Ukraine; couscous = Greece
        """),
    ),
)
