"""Short general knowledge that Koala Nano is taught: countries, famous people, the sky, the body, plain reasons."""

from __future__ import annotations

from facts import either


def _table(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(cell.strip() for cell in line.split("|")) for line in text.strip().splitlines())


# country, capital, continent, language
COUNTRIES = _table("""
France | Paris | Europe | French
Germany | Berlin | Europe | German
Italy | Rome | Europe | Italian
Spain | Madrid | Europe | Spanish
Portugal | Lisbon | Europe | Portuguese
England | London | Europe | English
Ireland | Dublin | Europe | English
Scotland | Edinburgh | Europe | English
Norway | Oslo | Europe | Norwegian
Sweden | Stockholm | Europe | Swedish
Denmark | Copenhagen | Europe | Danish
Finland | Helsinki | Europe | Finnish
Iceland | Reykjavik | Europe | Icelandic
Poland | Warsaw | Europe | Polish
Austria | Vienna | Europe | German
Hungary | Budapest | Europe | Hungarian
Greece | Athens | Europe | Greek
Russia | Moscow | Europe | Russian
Ukraine | Kyiv | Europe | Ukrainian
Turkey | Ankara | Asia | Turkish
Japan | Tokyo | Asia | Japanese
China | Beijing | Asia | Chinese
India | New Delhi | Asia | Hindi
Thailand | Bangkok | Asia | Thai
Vietnam | Hanoi | Asia | Vietnamese
Egypt | Cairo | Africa | Arabic
Morocco | Rabat | Africa | Arabic
Kenya | Nairobi | Africa | Swahili
Ghana | Accra | Africa | English
Nigeria | Abuja | Africa | English
Canada | Ottawa | North America | English
Mexico | Mexico City | North America | Spanish
Cuba | Havana | North America | Spanish
Brazil | Brasilia | South America | Portuguese
Argentina | Buenos Aires | South America | Spanish
Chile | Santiago | South America | Spanish
Peru | Lima | South America | Spanish
Colombia | Bogota | South America | Spanish
Australia | Canberra | Australia | English
""")

# person, who it was, what for
PEOPLE = _table("""
Albert Einstein | a physicist | the theory of relativity
Isaac Newton | a physicist | the law of gravity
Marie Curie | a scientist | her work on radioactivity
Charles Darwin | a scientist | the theory of evolution
Galileo Galilei | a scientist | looking at the planets with a telescope
Ada Lovelace | a mathematician | writing the first computer program
Alan Turing | a mathematician | his ideas about computers
William Shakespeare | a writer | Hamlet and Romeo and Juliet
Charles Dickens | a writer | Oliver Twist
Mark Twain | a writer | Tom Sawyer
Jane Austen | a writer | Pride and Prejudice
Leonardo da Vinci | a painter | the Mona Lisa
Vincent van Gogh | a painter | Sunflowers and Starry Night
Pablo Picasso | a painter | Guernica
Mozart | a composer | The Magic Flute
Beethoven | a composer | nine symphonies
Bach | a composer | his music for the organ
Christopher Columbus | a sailor | sailing to America in 1492
Neil Armstrong | an astronaut | the first walk on the moon
Napoleon | an emperor | his wars in Europe
Cleopatra | a queen | ruling Egypt
Mahatma Gandhi | a leader | freeing India without weapons
Nelson Mandela | a leader | ending apartheid in South Africa
Florence Nightingale | a nurse | making hospitals better
Alexander Graham Bell | an inventor | the telephone
Thomas Edison | an inventor | the light bulb
Johannes Gutenberg | an inventor | printing with movable letters
""")

# question forms, reply, what it is about, brief
KNOWN = tuple(
    (either(forms), reply, about, brief)
    for forms, reply, about, brief in (
        (
            "how many planets are there|how many planets does the sun have|number of planets",
            "There are eight planets around the sun.",
            "the planets",
            "Eight.",
        ),
        (
            "what is the largest planet|which planet is the biggest|name the biggest planet",
            "Jupiter is the largest planet.",
            "the planets",
            "Jupiter.",
        ),
        (
            "what is the smallest planet|which planet is the smallest",
            "Mercury is the smallest planet.",
            "the planets",
            "Mercury.",
        ),
        (
            "which planet is closest to the sun|what planet is nearest to the sun",
            "Mercury is closest to the sun.",
            "the planets",
            "Mercury.",
        ),
        (
            "which planet is red|which planet is called the red planet|what is the red planet",
            "Mars is called the red planet.",
            "the planets",
            "Mars.",
        ),
        (
            "which planet has rings|what planet has rings|name a planet with rings",
            "Saturn has large rings.",
            "the planets",
            "Saturn.",
        ),
        (
            "which planet do we live on|what planet are we on|on which planet do people live",
            "We live on the planet Earth.",
            "the Earth",
            "Earth.",
        ),
        (
            "what is the sun|tell me about the sun|is the sun a star|what kind of thing is the sun",
            "The sun is a star. It gives us light and warmth.",
            "the sun",
            "A star.",
        ),
        (
            "what is the moon|tell me about the moon|is the moon a planet",
            "The moon is a ball of rock that goes around the Earth.",
            "the moon",
            "A ball of rock.",
        ),
        (
            "what is a star|tell me about stars|what are stars",
            "A star is a hot ball of gas that gives light. The sun is one.",
            "the stars",
            "A hot ball of gas.",
        ),
        (
            "why is the sky blue|what makes the sky blue|how come the sky is blue",
            "The air scatters blue light from the sun more than red light, so the sky looks blue.",
            "the sky",
            "Because air scatters blue light.",
        ),
        (
            "why does it rain|where does rain come from|how does rain form|what makes rain",
            "Water rises from the sea into the air, cools into clouds, and falls down as rain.",
            "the rain",
            "Clouds cool and drop their water.",
        ),
        (
            "why is the sea salty|why is the ocean salty|what makes the sea salty",
            "Rivers wash salt out of the rocks and carry it into the sea.",
            "the sea",
            "Rivers bring salt.",
        ),
        (
            "why is grass green|why are leaves green|what makes leaves green",
            "Leaves are green because of chlorophyll, which catches the light of the sun.",
            "leaves",
            "Because of chlorophyll.",
        ),
        (
            "why do we sleep|why do people sleep|what is sleep for|why is sleep important",
            "Sleep lets the body rest and the mind sort what it has learned.",
            "sleep",
            "To rest.",
        ),
        (
            "why do cats purr|what does it mean when a cat purrs",
            "Cats mostly purr when they feel safe and happy.",
            "cats",
            "They feel safe.",
        ),
        (
            "why do birds sing|what do birds sing for",
            "Birds sing to find a partner and to guard their home.",
            "birds",
            "To find a partner.",
        ),
        (
            "why do leaves fall in autumn|why do trees lose their leaves",
            "Trees drop their leaves to save water through the cold winter.",
            "trees",
            "To save water.",
        ),
        (
            "why is there day and night|what makes day and night|why does it get dark",
            "The Earth turns, so each side faces the sun for a while.",
            "day and night",
            "The Earth turns.",
        ),
        (
            "why are there seasons|what makes the seasons|why is it cold in winter",
            "The Earth is tilted, so the sun stands higher in summer than in winter.",
            "the seasons",
            "The Earth is tilted.",
        ),
        (
            "what is gravity|tell me about gravity|why do things fall down|why does an apple fall",
            "Gravity is the pull that makes things fall to the ground.",
            "gravity",
            "The pull of the Earth.",
        ),
        (
            "what is electricity|tell me about electricity",
            "Electricity is the flow of tiny charges. It makes lamps and machines work.",
            "electricity",
            "Flowing charges.",
        ),
        (
            "what is a volcano|tell me about volcanoes|what are volcanoes",
            "A volcano is a mountain that lets hot melted rock out of the Earth.",
            "volcanoes",
            "A mountain with melted rock.",
        ),
        (
            "what is an earthquake|tell me about earthquakes|what causes an earthquake",
            "In an earthquake the ground shakes, because plates of rock slip deep below.",
            "earthquakes",
            "Shaking ground.",
        ),
        ("what is ice made of|what is snow made of|what is ice", "It is frozen water.", "water", "Frozen water."),
        (
            "at what temperature does water boil|when does water boil|how hot is boiling water",
            "Water boils at 100 degrees Celsius.",
            "water",
            "At 100 degrees.",
        ),
        (
            "at what temperature does water freeze|when does water freeze|how cold is ice",
            "Water freezes at zero degrees Celsius.",
            "water",
            "At zero degrees.",
        ),
        (
            "what do plants need|what does a plant need to grow|how do plants grow|how do I grow a plant",
            "A plant needs light, water, air and soil to grow.",
            "plants",
            "Light, water, air and soil.",
        ),
        (
            "what do bees make|who makes honey|where does honey come from",
            "Bees make honey from nectar.",
            "bees",
            "Bees make honey.",
        ),
        ("where does milk come from|which animal gives milk", "Milk mostly comes from cows.", "milk", "From cows."),
        (
            "where does bread come from|what is bread made of|how is bread made",
            "Bread is made of flour, water, salt and yeast, and it is baked in an oven.",
            "bread",
            "Flour and water.",
        ),
        ("what is cheese made of|where does cheese come from", "Cheese is made of milk.", "cheese", "Milk."),
        (
            "what is the largest animal|which animal is the biggest|what is the biggest animal in the world",
            "The blue whale is the largest animal.",
            "whales",
            "The blue whale.",
        ),
        (
            "what is the tallest animal|which animal is the tallest",
            "The giraffe is the tallest animal.",
            "giraffes",
            "The giraffe.",
        ),
        (
            "what is the fastest animal|which animal runs fastest",
            "The cheetah runs faster than any other animal.",
            "the cheetah",
            "The cheetah.",
        ),
        (
            "who is the king of the animals|which animal is called the king",
            "The lion is called the king of the animals.",
            "the lion",
            "The lion.",
        ),
        (
            "what is the highest mountain|which mountain is the highest|name the highest mountain",
            "Mount Everest is the highest mountain.",
            "mountains",
            "Mount Everest.",
        ),
        (
            "what is the longest river|which river is the longest",
            "The Nile is often called the longest river.",
            "rivers",
            "The Nile.",
        ),
        (
            "what is the largest ocean|which ocean is the largest|name the biggest ocean",
            "The Pacific is the largest ocean.",
            "the sea",
            "The Pacific.",
        ),
        (
            "what is the largest country|which country is the biggest",
            "Russia is the largest country.",
            "countries",
            "Russia.",
        ),
        (
            "how many continents are there|how many continents does the Earth have|name the continents",
            "There are seven continents: Africa, Antarctica, Asia, Australia, Europe, North America and South America.",
            "the continents",
            "Seven.",
        ),
        (
            "how many letters are in the alphabet|how many letters does the alphabet have",
            "The English alphabet has 26 letters.",
            "the alphabet",
            "26.",
        ),
        (
            "how many minutes are in an hour|how many minutes does an hour have",
            "An hour has 60 minutes.",
            "the time",
            "60.",
        ),
        (
            "how many seconds are in a minute|how many seconds does a minute have",
            "A minute has 60 seconds.",
            "the time",
            "60.",
        ),
        (
            "how many weeks are in a year|how many weeks does a year have",
            "A year has about 52 weeks.",
            "the year",
            "52.",
        ),
        (
            "how many fingers do I have|how many fingers does a person have|how many fingers are on two hands",
            "People mostly have ten fingers, with the thumbs.",
            "fingers",
            "Ten.",
        ),
        ("how many legs does a table have|how many legs has a chair", "It mostly has four legs.", "furniture", "Four."),
        ("how many wheels does a car have|how many wheels has a car", "A car has four wheels.", "cars", "Four."),
        (
            "how many wheels does a bicycle have|how many wheels has a bike",
            "A bicycle has two wheels.",
            "bicycles",
            "Two.",
        ),
        ("how many sides does a triangle have|what is a triangle", "A triangle has three sides.", "shapes", "Three."),
        ("how many sides does a square have|what is a square", "A square has four equal sides.", "shapes", "Four."),
        (
            "what is a circle|how many corners does a circle have",
            "A circle is round and has no corners.",
            "shapes",
            "Round.",
        ),
        (
            "what does the heart do|what is the heart for|tell me about the heart",
            "The heart pumps blood through the body.",
            "the heart",
            "It pumps blood.",
        ),
        (
            "what does the brain do|what is the brain for|tell me about the brain",
            "The brain thinks, feels and moves the body.",
            "the brain",
            "It thinks.",
        ),
        ("what are lungs for|what do lungs do", "Lungs take air into the body.", "the lungs", "They take in air."),
        ("what are eyes for|what do eyes do", "We see with our eyes.", "the eyes", "To see."),
        ("what are ears for|what do ears do", "We hear with our ears.", "the ears", "To hear."),
        (
            "what is a book|what are books for|tell me about books",
            "A book has pages with words that people read.",
            "books",
            "Pages with words.",
        ),
        (
            "what is a computer|what are computers for|tell me about computers",
            "A computer is a machine that follows programs. I run on one.",
            "computers",
            "A machine.",
        ),
        (
            "what is the internet|tell me about the internet",
            "The internet joins computers all over the world. I do not need it.",
            "the internet",
            "Joined computers.",
        ),
        (
            "what is a language model|what is a chatbot|how does a language model work|what is an AI",
            "A language model has learned from many texts which word comes next, and so it can answer.",
            "language models",
            "A program that guesses words.",
        ),
        (
            "what is music|tell me about music",
            "Music is sound that people make to enjoy it.",
            "music",
            "Sound to enjoy.",
        ),
        (
            "what is a friend|what makes a good friend",
            "A friend is somebody who likes you and helps you.",
            "friends",
            "Somebody who likes you.",
        ),
        (
            "what is a school|what do children do at school",
            "At school children learn to read, write and count.",
            "school",
            "A place to learn.",
        ),
        ("what is a doctor|what does a doctor do", "A doctor helps people who are ill.", "doctors", "Helps the ill."),
        ("what does a baker do|what is a baker", "A baker bakes bread and cakes.", "bakers", "Bakes bread."),
        ("what does a farmer do|what is a farmer", "A farmer grows food and keeps animals.", "farmers", "Grows food."),
        ("what does a teacher do|what is a teacher", "A teacher helps others to learn.", "teachers", "Helps to learn."),
        (
            "how do I make tea|how do you make a cup of tea|how is tea made",
            "Boil water, pour it over the tea, and wait for three minutes.",
            "tea",
            "Hot water and three minutes.",
        ),
        (
            "how do I boil an egg|how do you cook an egg|how long does an egg boil",
            "Put the egg into boiling water for about eight minutes.",
            "eggs",
            "Eight minutes.",
        ),
        (
            "how do I make a sandwich|how do you make a sandwich",
            "Put butter and cheese between two slices of bread.",
            "sandwiches",
            "Bread, butter and cheese.",
        ),
        (
            "how can I sleep better|how do I fall asleep|I cannot sleep",
            "Go to bed at the same time each day, and put the screen away before.",
            "sleep",
            "Keep a fixed time.",
        ),
        (
            "how do I learn faster|how can I learn better|how do I study well",
            "Learn a little each day, and ask yourself questions about it.",
            "learning",
            "A little each day.",
        ),
        (
            "how can I relax|how do I calm down|I am nervous|I am stressed",
            "Breathe in slowly, hold it for a moment, and breathe out slowly.",
            "calm",
            "Breathe slowly.",
        ),
        (
            "how do I make friends|how can I find friends",
            "Be kind, listen well, and do things with others that you both like.",
            "friends",
            "Be kind and listen.",
        ),
        (
            "what should I do today|give me an idea for today|what can I do this weekend",
            "You could take a walk, read a book or call a friend.",
            "your day",
            "Take a walk.",
        ),
    )
)
