"""The small world that Koala Nano knows: plain tables.

`world.py` composes dialogues from these tables. Everything the model may state as a fact stands
here, so a wrong answer about a cat is either a wrong line below or a weak model, nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Animal:
    """One animal; `rank` orders the animals by size, smallest first."""

    name: str
    plural: str
    kind: str
    size: str
    colour: str
    food: str
    home: str
    sound: str
    legs: str
    flies: bool
    rank: int


@dataclass(frozen=True)
class Food:
    """One thing to eat or drink; `article` is empty for what is not counted."""

    name: str
    article: str
    kind: str
    colour: str
    taste: str


def either(text: str) -> tuple[str, ...]:
    """The alternatives in `text`, which `|` separates."""
    return tuple(text.split("|"))


def _animal(row: list[str], rank: int) -> Animal:
    name, plural, kind, size, colour, food, home, sound, legs, flies = row
    return Animal(name, plural, kind, size, colour, food, home, sound, legs, flies == "yes", rank)


def _animals(table: str) -> tuple[Animal, ...]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return tuple(_animal(row, rank) for rank, row in enumerate(rows))


def _foods(table: str) -> tuple[Food, ...]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return tuple(Food(*row) for row in rows)


# Ordered by size, smallest first.
ANIMALS = _animals("""
ant      | ants       | insect| tiny | black  | crumbs | in the ground   |        | six  | no
bee      | bees       | insect| tiny | yellow | nectar | in a hive       | buzz   | six  | yes
spider   | spiders    | spider| tiny | black  | flies  | in a web        |        | eight| no
butterfly| butterflies| insect| tiny | orange | nectar | in the garden   |        | six  | yes
snail    | snails     | snail | tiny | brown  | leaves | in the garden   |        | no   | no
frog     | frogs      | frog  | small| green  | flies  | near a pond     | croak  | four | no
mouse    | mice       | mammal| small| grey   | seeds  | in a hole       | squeak | four | no
fish     | fish       | fish  | small| silver | worms  | in the water    |        | no   | no
duck     | ducks      | bird  | small| white  | plants | near a pond     | quack  | two  | yes
hen      | hens       | bird  | small| brown  | corn   | on a farm       | cluck  | two  | no
owl      | owls       | bird  | small| brown  | mice   | in the forest   | hoo    | two  | yes
parrot   | parrots    | bird  | small| green  | nuts   | in the jungle   | squawk | two  | yes
squirrel | squirrels  | mammal| small| red    | nuts   | in a tree       | chirp  | four | no
rabbit   | rabbits    | mammal| small| white  | carrots| in a hole       |        | four | no
cat      | cats       | mammal| small| grey   | fish   | in a house      | meow   | four | no
penguin  | penguins   | bird  | small| black  | fish   | on the ice      | honk   | two  | no
koala    | koalas     | mammal| small| grey   | leaves | in a tree       |        | four | no
fox      | foxes      | mammal| small| orange | berries| in the forest   | yip    | four | no
monkey   | monkeys    | mammal| small| brown  | bananas| in the jungle   | chatter| two  | no
dog      | dogs       | mammal| small| brown  | meat   | in a house      | woof   | four | no
sheep    | sheep      | mammal| big  | white  | grass  | on a farm       | baa    | four | no
goat     | goats      | mammal| big  | white  | grass  | in the mountains| meh    | four | no
wolf     | wolves     | mammal| big  | grey   | meat   | in the forest   | howl   | four | no
pig      | pigs       | mammal| big  | pink   | corn   | on a farm       | oink   | four | no
zebra    | zebras     | mammal| big  | striped| grass  | on the plain    | bray   | four | no
lion     | lions      | mammal| big  | yellow | meat   | on the plain    | roar   | four | no
tiger    | tigers     | mammal| big  | striped| meat   | in the jungle   | growl  | four | no
horse    | horses     | mammal| big  | brown  | hay    | on a farm       | neigh  | four | no
cow      | cows       | mammal| big  | brown  | grass  | on a farm       | moo    | four | no
camel    | camels     | mammal| big  | brown  | plants | in the desert   | grunt  | four | no
bear     | bears      | mammal| big  | brown  | honey  | in the forest   | growl  | four | no
giraffe  | giraffes   | mammal| huge | yellow | leaves | on the plain    |        | four | no
elephant | elephants  | mammal| huge | grey   | plants | on the plain    | trumpet| four | no
whale    | whales     | mammal| huge | blue   | krill  | in the sea      | song   | no   | no
""")

FOODS = _foods("""
apple      | an | fruit     | red    | sweet
banana     | a  | fruit     | yellow | sweet
lemon      | a  | fruit     | yellow | sour
orange     | an | fruit     | orange | sweet
pear       | a  | fruit     | green  | sweet
grape      | a  | fruit     | purple | sweet
cherry     | a  | fruit     | red    | sweet
strawberry | a  | fruit     | red    | sweet
plum       | a  | fruit     | purple | sweet
lime       | a  | fruit     | green  | sour
tomato     | a  | vegetable | red    | fresh
carrot     | a  | vegetable | orange | sweet
potato     | a  | vegetable | brown  | mild
onion      | an | vegetable | white  | sharp
cucumber   | a  | vegetable | green  | fresh
pea        | a  | vegetable | green  | sweet
bread      |    | food      | brown  | mild
cheese     |    | food      | yellow | salty
rice       |    | food      | white  | mild
honey      |    | food      | golden | sweet
chocolate  |    | food      | brown  | sweet
salt       |    | food      | white  | salty
sugar      |    | food      | white  | sweet
cake       |    | food      | golden | sweet
soup       |    | food      | orange | salty
butter     |    | food      | yellow | mild
milk       |    | drink     | white  | mild
coffee     |    | drink     | black  | bitter
tea        |    | drink     | brown  | bitter
lemonade   |    | drink     | yellow | sour
""")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = either("January|February|March|April|May|June|July|August|September|October|November|December")
MONTH_DAYS = ("31", "28 or 29", "31", "30", "31", "30", "31", "31", "30", "31", "30", "31")
SEASONS = ("winter", "spring", "summer", "autumn")
ORDINALS = either("first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth")

COLOURS = either("red|blue|green|yellow|orange|purple|pink|brown|black|white|grey")
MIXES = (
    ("red", "blue", "purple"),
    ("red", "yellow", "orange"),
    ("blue", "yellow", "green"),
    ("red", "white", "pink"),
    ("black", "white", "grey"),
    ("red", "green", "brown"),
)
COLOURED = (
    ("the sky", "blue"),
    ("grass", "green"),
    ("snow", "white"),
    ("the sun", "yellow"),
    ("the sea", "blue"),
    ("a leaf", "green"),
    ("coal", "black"),
    ("blood", "red"),
    ("a cloud", "white"),
    ("fire", "orange"),
    ("the night", "black"),
    ("a rose", "red"),
    ("wood", "brown"),
    ("gold", "yellow"),
)

OPPOSITES = (
    ("hot", "cold"),
    ("big", "small"),
    ("up", "down"),
    ("left", "right"),
    ("day", "night"),
    ("happy", "sad"),
    ("fast", "slow"),
    ("old", "young"),
    ("open", "closed"),
    ("wet", "dry"),
    ("full", "empty"),
    ("hard", "soft"),
    ("light", "dark"),
    ("long", "short"),
    ("rich", "poor"),
    ("clean", "dirty"),
    ("loud", "quiet"),
    ("strong", "weak"),
    ("early", "late"),
    ("first", "last"),
    ("near", "far"),
    ("high", "low"),
    ("thick", "thin"),
    ("good", "bad"),
    ("yes", "no"),
    ("in", "out"),
    ("easy", "difficult"),
    ("deep", "shallow"),
    ("sweet", "sour"),
    ("true", "false"),
    ("begin", "end"),
    ("push", "pull"),
    ("buy", "sell"),
    ("win", "lose"),
    ("love", "hate"),
    ("black", "white"),
    ("summer", "winter"),
    ("north", "south"),
    ("east", "west"),
    ("before", "after"),
    ("always", "never"),
)

# word, what it is, what to wear or do
WEATHER = (
    ("rain", "water that falls from the clouds", "Take an umbrella"),
    ("snow", "frozen water that falls as white flakes", "Wear a warm coat and boots"),
    ("wind", "air that moves", "Wear a jacket and hold your hat"),
    ("fog", "a cloud that lies on the ground", "Walk slowly and carry a light"),
    ("sunshine", "light and warmth from the sun", "Wear a hat and drink water"),
    ("hail", "small balls of ice that fall from the clouds", "Stay inside until it stops"),
    ("a storm", "strong wind with heavy rain", "Stay inside and close the windows"),
    ("thunder", "the loud sound after lightning", "Stay inside until it is over"),
    ("lightning", "a bright flash of electricity in the sky", "Stay inside, away from trees"),
    ("ice", "water that is frozen hard", "Walk with care"),
    ("a rainbow", "a bow of colours made by sun and rain", "Look up and enjoy it"),
    ("a cloud", "many tiny drops of water in the sky", "Look for shapes in it"),
)

NAMES = either(
    "Ada|Alex|Amir|Amy|Ana|Anna|Ben|Bob|Carl|Chloe|Clara|Dan|David|Diana|Elena|Ella|Emil|Emma|"
    "Eric|Eva|Felix|Finn|Frank|Grace|Hana|Hannah|Henry|Ian|Ida|Ines|Ivan|Jack|Jan|Jane|Jim|Joe|"
    "John|Jonas|Julia|Kai|Karim|Kate|Kim|Lara|Laura|Lea|Leo|Lily|Lina|Lisa|Luca|Lucy|Luis|"
    "Maria|Mark|Mary|Max|Maya|Mia|Mike|Mila|Mona|Nadia|Nina|Noah|Nora|Olga|Oliver|Omar|Oscar|"
    "Otto|Paul|Peter|Priya|Rosa|Ruth|Sam|Sara|Sarah|Simon|Sofia|Sue|Tara|Theo|Tim|Tina|Tom|"
    "Vera|Victor|Wei|Will|Yara|Yuki|Zoe|Aaron|Adam|Agnes|Alan|Albert|Alice|Amanda|Andrea|Andrew|"
    "Angela|Anton|Arthur|Astrid|Barbara|Beatrice|Bernd|Brian|Bruno|Camille|Carlos|Carmen|Charlotte|"
    "Chris|Christian|Claire|Daniel|Deepak|Dmitri|Dorothy|Edward|Eleanor|Elizabeth|Esther|Fatima|"
    "Fiona|Francesca|Gabriel|George|Georg|Greta|Gustav|Hassan|Helena|Hiroshi|Hugo|Ibrahim|Ingrid|"
    "Isabel|Jakob|James|Javier|Jessica|Johanna|Joseph|Karl|Katharina|Kevin|Klaus|Lukas|Magnus|"
    "Marcel|Margaret|Mariam|Martin|Matthew|Mehmet|Michael|Mohammed|Natalie|Nathan|Nicole|Patrick|"
    "Pedro|Philip|Rachel|Rafael|Rebecca|Richard|Robert|Sandra|Sebastian|Stefan|Susan|Sven|Thomas|"
    "Ulrike|Valentina|Vikram|Walter|Wendy|William|Xavier|Yusuf"
)
PET_NAMES = either(
    "Rex|Bella|Max|Luna|Rocky|Coco|Milo|Lucky|Spot|Daisy|Felix|Buddy|Pepper|Ginger|Snowy|Biscuit|Oscar|Ruby|Teddy|Molly"
)

JOKES = (
    "Why did the bee stay at home? It was too busy to leave.",
    "What is a cat's favourite colour? Purr-ple.",
    "Why was the calendar tired? Its days were too long.",
    "What do you call a sleeping cow? A bull-dozer.",
    "Why did the banana go to the doctor? It was not peeling well.",
    "What did the cloud say to the sun? You are too bright for me.",
    "Why do fish never play tennis? They are afraid of the net.",
    "Why was six happy? Because seven was on holiday.",
)
NUMBER_WORDS = either("zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve")
