"""The tables of `builtin_facts` on animals, the body, materials, work and words.

Owns these facts and their wordings; `fact_tables` says what a relation is. Written for this
project. Loads no torch.
"""

from __future__ import annotations

from drllm.tasks.fact_tables import Relation, exceptions, table

ANIMALS = (
    Relation(
        name="young",
        facts=table("""
            cow = calf; horse = foal; cat = kitten; dog = puppy; sheep = lamb; goat = kid
            pig = piglet; deer = fawn; bear = cub; kangaroo = joey; goose = gosling
            duck = duckling; chicken = chick; swan = cygnet; frog = tadpole; eel = elver
            hare = leveret; owl = owlet; eagle = eaglet; pigeon = squab; turkey = poult
            butterfly = caterpillar; spider = spiderling; fly = maggot
        """),
        forward=("What is a young {subject} called?", "What is the name for a baby {subject}?"),
        backward=(
            "Which animal was once a {answer}?",
            "A young animal called '{answer}' grows up to be what?",
        ),
        also=exceptions("""
            goose = chick; duck = chick; swan = chick; owl = chick; eagle = chick; pigeon = chick
            turkey = chick; chicken = poult; deer = calf, kid; butterfly = maggot
        """),
    ),
    Relation(
        name="animal class",
        facts=table("""
            whale = mammal; bat = mammal; dolphin = mammal; kangaroo = mammal; mouse = mammal
            penguin = bird; ostrich = bird; sparrow = bird; parrot = bird; eagle = bird
            crocodile = reptile; lizard = reptile; snake = reptile; tortoise = reptile
            iguana = reptile; frog = amphibian; toad = amphibian; newt = amphibian
            salamander = amphibian; shark = fish; salmon = fish; trout = fish; seahorse = fish
            tuna = fish; ant = insect; bee = insect; butterfly = insect; beetle = insect
            mosquito = insect; spider = arachnid; scorpion = arachnid; tick = arachnid
            crab = crustacean; lobster = crustacean; shrimp = crustacean; snail = mollusc
            octopus = mollusc; oyster = mollusc; squid = mollusc; slug = mollusc
        """),
        forward=(
            "What kind of animal is the {subject}?",
            "To which group of animals does the \
{subject} belong?",
        ),
    ),
    Relation(
        name="animal sound",
        facts=table("""
            dog = bark; cat = meow; cow = moo; sheep = baa; pig = oink; duck = quack; lion = roar
            snake = hiss; horse = neigh; bee = buzz; owl = hoot; frog = croak; wolf = howl
            rooster = crow; donkey = bray; mouse = squeak; goat = bleat; turkey = gobble
            elephant = trumpet; pigeon = coo; hen = cluck; crow = caw
        """),
        forward=("What sound does the {subject} make?", "Which sound is typical of the {subject}?"),
        backward=("Which animal is known for its {answer}?",),
        also=exceptions("""
            dog = howl; cat = hiss; sheep = bleat; goat = baa; pig = squeak; wolf = bark
            rooster = cluck; hen = crow; turkey = cluck; elephant = roar; owl = hiss
            crow = crow, croak
        """),
    ),
    Relation(
        name="animal home",
        facts=table("""
            honeybee = hive; robin = nest; spider = web; rabbit = burrow; beaver = lodge
            horse = stable; ant = anthill; lion = den; chicken = coop; guard dog = kennel
            pig = sty; squirrel = drey; pet goldfish = aquarium; badger = sett; otter = holt
        """),
        forward=("Where does the {subject} live?", "What is the home of the {subject} called?"),
        also=exceptions("""
            honeybee = nest; spider = nest, burrow; rabbit = den, nest
            beaver = den, burrow, nest; ant = nest; chicken = nest
            guard dog = den; squirrel = nest, den; badger = burrow, den
            otter = den, burrow
        """),
    ),
    Relation(
        name="group",
        facts=table("""
            lions = pride; wolves = pack; fish = school; bees = swarm; crows = murder
            geese = gaggle; cattle = herd; ants = colony; whales = pod; puppies = litter
            ships = fleet; singers = choir; flowers = bouquet; grapes = bunch; soldiers = army
            musicians = orchestra; trees = forest; stars = galaxy; stairs = flight
        """),
        forward=(
            "What is a group of {subject} called?",
            "Which word names many {subject} \
together?",
        ),
        also=exceptions("""
            geese = flight; crows = flight; bees = colony, flight; ants = swarm, army
            whales = school, herd; puppies = pack; flowers = bunch; fish = pod, swarm
            musicians = choir
        """),
    ),
    Relation(
        name="food of animals",
        facts=table("""
            giant panda = bamboo; koala = eucalyptus leaves; anteater = ants; cow = grass
            squirrel = nuts; hummingbird = nectar; vampire bat = blood; blue whale = krill
            silkworm = mulberry leaves; otter = fish; termite = wood
        """),
        forward=("What does the {subject} mainly eat?", "What is the main food of the {subject}?"),
        also=exceptions("giant panda = grass; termite = grass; blue whale = fish"),
    ),
)

BODY = (
    Relation(
        name="organ",
        facts=table("""
            pumps blood = heart; takes oxygen from the air = lungs; controls thinking = brain
            breaks down food with acid = stomach; filters waste out of the blood = kidneys
            is used to see = eyes; is used to hear = ears; is used to smell = nose
            makes bile = liver; stores urine = bladder; makes insulin = pancreas
            is used to chew = teeth; covers the whole body = skin; protects the brain = skull
            stores bile = gallbladder; makes new blood cells = bone marrow
            carries signals between the brain and the body = nerves
            absorbs most of the nutrients from food = small intestine
        """),
        forward=("Which part of the human body {subject}?", "What part of the body {subject}?"),
        also=exceptions("filters waste out of the blood = liver"),
    ),
)

THINGS = (
    Relation(
        name="made from",
        facts=table("""
            cheese = milk; wine = grapes; chocolate = cocoa beans; tofu = soybeans; paper = wood
            glass = sand; steel = iron; an omelette = eggs; French fries = potatoes
            guacamole = avocados; hummus = chickpeas; ketchup = tomatoes; prunes = plums
            cider = apples; sake = rice; marzipan = almonds; linen = flax; honey = nectar
            rum = sugar cane; tequila = agave; bronze = copper and tin; brass = copper and zinc
            sauerkraut = cabbage; porridge = oats; beer = barley; silk = cocoons of a moth
            polenta = maize; leather = animal skin; pickles = cucumbers
        """),
        forward=(
            "What is the main raw material of {subject}?",
            "Which raw material is needed most to make {subject}?",
        ),
        also=exceptions("""
            chocolate = milk, sugar cane, almonds; beer = rice, oats, maize; paper = flax, rice
            marzipan = eggs, sugar cane; an omelette = milk; porridge = milk, rice, barley, maize
            ketchup = sugar cane; guacamole = tomatoes; tequila = sugar cane
            wine = apples, plums, rice; pickles = cabbage
        """),
    ),
    Relation(
        name="tool",
        facts=table("""
            drive nails into wood = hammer; turn screws = screwdriver; tighten bolts = wrench
            dig a hole in the ground = shovel; cut paper = scissors; sweep the floor = broom
            gather fallen leaves = rake; look at distant stars = telescope
            look at bacteria = microscope; boil water for tea = kettle; sew cloth = needle
            chop down a tree = axe; grip and bend wire = pliers; cut a plank of wood = saw
            smooth rough wood = sandpaper; shave a beard = razor; weave cloth = loom
            flatten dough = rolling pin; drain cooked pasta = colander
            carve stone = chisel; melt metal = furnace; lift a car to change a tyre = jack
        """),
        forward=("Which tool is used to {subject}?", "What would you use to {subject}?"),
        also=exceptions("""
            chop down a tree = saw; cut a plank of wood = axe, chisel; carve stone = hammer
            cut paper = razor; tighten bolts = pliers; grip and bend wire = wrench
            smooth rough wood = chisel; shave a beard = scissors; sweep the floor = rake
            dig a hole in the ground = rake; gather fallen leaves = broom, shovel
        """),
    ),
    Relation(
        name="job",
        facts=table("""
            bakes bread = baker; flies an aeroplane = pilot; repairs water pipes = plumber
            treats sick animals = veterinarian; treats teeth = dentist; cuts hair = barber
            builds with wood = carpenter; makes suits = tailor; cuts and sells meat = butcher
            designs buildings = architect; studies the stars = astronomer
            studies rocks = geologist; repairs cars = mechanic; lays bricks = mason
            sells flowers = florist; prepares medicines = pharmacist; lends books = librarian
            forges iron = blacksmith; studies plants = botanist; studies animals = zoologist
            studies fossils = palaeontologist; defends people in court = lawyer
            studies weather = meteorologist; shoes horses = farrier; mends shoes = cobbler
            makes barrels = cooper; makes clay pots = potter; studies insects = entomologist
            studies earthquakes = seismologist; studies the past = historian
            makes maps = cartographer; studies coins = numismatist; rides racehorses = jockey
            treats skin diseases = dermatologist; treats heart diseases = cardiologist
        """),
        forward=("What do you call a person who {subject}?", "Who {subject}?"),
        also=exceptions("""
            shoes horses = blacksmith; forges iron = farrier; studies insects = zoologist
            studies fossils = geologist; studies earthquakes = geologist
            studies rocks = palaeontologist, seismologist; treats sick animals = zoologist
            studies animals = entomologist, palaeontologist; studies the past = palaeontologist
            builds with wood = cooper; makes barrels = carpenter
        """),
    ),
    Relation(
        name="colour",
        facts=table("""
            a ripe banana = yellow; fresh grass = green; human blood = red; fresh snow = white
            coal = black; a clear sky at noon = blue; a carrot = orange; milk chocolate = brown
            a ripe lemon = yellow; an emerald = green; a ruby = red; a sapphire = blue
            an elephant = grey; a flamingo = pink; a ripe strawberry = red; milk = white
            an aubergine = purple; a raven = black; the yolk of an egg = yellow
            an amethyst = purple; a pumpkin = orange; spinach = green
        """),
        forward=("What colour is {subject}?", "Which colour does {subject} have?"),
        also=exceptions("""
            the yolk of an egg = orange; a flamingo = orange, red; a sapphire = pink, yellow
            an elephant = brown; an amethyst = pink; an aubergine = black
            a pumpkin = yellow, green; a carrot = purple, yellow; coal = grey; a ruby = pink
        """),
    ),
    Relation(
        name="family of instruments",
        facts=table("""
            violin = strings; cello = strings; harp = strings; viola = strings; trumpet = brass
            trombone = brass; tuba = brass; French horn = brass; flute = woodwind
            clarinet = woodwind; oboe = woodwind; bassoon = woodwind; snare drum = percussion
            xylophone = percussion; cymbals = percussion; timpani = percussion
        """),
        forward=(
            "To which family of instruments does the {subject} belong?",
            "In which section of the orchestra is the {subject}?",
        ),
    ),
)

WORDS = (
    Relation(
        name="opposite",
        facts=table("""
            hot = cold; big = small; fast = slow; open = closed; full = empty; wet = dry
            rich = poor; strong = weak; happy = sad; deep = shallow; loud = quiet; early = late
            true = false; clean = dirty; near = far; north = south; buy = sell; win = lose
            love = hate; accept = reject; always = never; cheap = expensive; expand = contract
            maximum = minimum; import = export; above = below; smooth = rough; sharp = blunt
            tight = loose; wide = narrow; generous = stingy; increase = decrease; friend = enemy
            guilty = innocent; hero = villain; entrance = exit; war = peace; attack = defend
            borrow = lend; polite = rude; public = private; temporary = permanent
            asleep = awake; brave = cowardly; victory = defeat; ancient = modern
            voluntary = compulsory; transparent = opaque; rural = urban; humble = proud
        """),
        forward=(
            "What is the opposite of '{subject}'?",
            "Which word means the opposite of \
'{subject}'?",
        ),
        also=exceptions("""
            big = narrow, weak; increase = contract; expand = decrease, narrow; win = defeat
            maximum = small, decrease; above = minimum; polite = proud; generous = poor
            friend = villain; love = enemy; sharp = shallow; hero = cowardly, enemy
            buy = lend; humble = rude; strong = cowardly; attack = peace; accept = hate
            deep = small; open = private, narrow; public = closed
        """),
    ),
    Relation(
        name="kind",
        facts=table("""
            tulip = flower; daisy = flower; oak = tree; willow = tree; birch = tree
            violin = musical instrument; trumpet = musical instrument; carrot = vegetable
            spinach = vegetable; broccoli = vegetable; pear = fruit; banana = fruit; plum = fruit
            shirt = piece of clothing; sock = piece of clothing; sofa = piece of furniture
            wardrobe = piece of furniture; lorry = vehicle; bicycle = vehicle; poodle = dog
            beagle = dog; copper = metal; aluminium = metal; diamond = gemstone
            sapphire = gemstone; denim = fabric; velvet = fabric; tennis = sport; hockey = sport
            waltz = dance; tango = dance; measles = disease; malaria = disease; euro = currency
            yen = currency; cheddar = cheese; mozzarella = cheese; sonnet = poem; limerick = poem
            halibut = fish; herring = fish; cobra = snake; python = snake; heron = bird
        """),
        forward=(
            "What kind of thing does the word '{subject}' stand for?",
            "The word '{subject}' names a kind of what?",
        ),
        also=exceptions("pear = tree; plum = tree"),
    ),
)
