"""English lessons for the sample data: facts of fourteen subjects, worked sums, questions, put together at random."""

from random import Random

NAMES = ["Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Iris", "Jack", "Laura", "Martin"]
PLACES = [
    "the school garden",
    "a small laboratory",
    "the village library",
    "the harbour",
    "a quiet workshop",
    "the hill",
]

FACTS = {
    "the water cycle": [
        "The sun warms the sea, and some of the water rises into the air as vapour.",
        "High above the ground the vapour cools and turns into tiny drops that form clouds.",
        "When the drops grow heavy enough they fall as rain, or as snow if the air is cold.",
        "Part of the rain runs down the slopes and gathers in streams, rivers and lakes.",
        "Another part sinks into the soil, feeds the roots of plants and fills wells.",
        "The amount of water on the planet hardly changes; it only moves from place to place.",
        "Trees also breathe out water through their leaves, which makes the air of a forest damp.",
    ],
    "simple machines": [
        "A lever is a stiff bar that turns around a fixed point called the fulcrum.",
        "With a long lever a small force can lift a heavy load, but the hand has to move further.",
        "A pulley changes the direction of a force, so that we can pull down to lift something up.",
        "A ramp lets us raise a load with less force over a longer way.",
        "No machine gives work for free: what we save in force we pay in distance.",
        "A screw is a ramp wound around a rod, and it holds two boards together.",
        "Wheels reduce the rubbing between a load and the ground.",
    ],
    "the night sky": [
        "The moon does not shine by itself; it sends the light of the sun back to us.",
        "It takes the moon about a month to pass through all its phases.",
        "Stars seem to move across the sky because the earth turns once a day.",
        "Planets wander slowly among the stars, which is how people told them apart long ago.",
        "A star looks small only because it is very far away.",
        "The same stars are seen in different seasons, since the earth travels around the sun.",
        "Away from the lamps of a town many more stars can be seen.",
    ],
    "bread and yeast": [
        "Yeast is a living thing, so small that thousands of cells fit on the tip of a needle.",
        "It feeds on sugar and gives off a gas that makes the dough rise.",
        "Warm water helps the yeast to grow, but boiling water kills it.",
        "Kneading stretches the dough and helps it to hold the bubbles of gas.",
        "In the oven the bubbles swell, the dough sets, and a brown crust forms.",
        "Salt gives taste and slows the yeast down a little.",
        "Dough that rests overnight in a cool place has more flavour.",
    ],
    "sound": [
        "A sound begins when something shakes and pushes the air around it.",
        "The push travels through the air as a wave until it reaches the ear.",
        "Fast shaking gives a high note, and slow shaking gives a low one.",
        "Sound travels faster through water than through air, and faster still through steel.",
        "In empty space there is nothing to shake, so no sound can be heard.",
        "A thick curtain swallows sound, while a bare wall sends it back as an echo.",
        "A longer string gives a lower note than a short one of the same kind.",
    ],
    "trade and money": [
        "Before there was money, people exchanged one good for another.",
        "Exchange is hard when the baker wants shoes but the shoemaker does not want bread.",
        "Money solves this because everybody accepts it and it does not spoil.",
        "A price tells us how much people want a thing and how hard it is to get.",
        "When a harvest is poor, the price of grain usually rises.",
        "A loan must be paid back with interest, which is the cost of using somebody else's money.",
        "Saving a little each month prepares a family for a bad season.",
    ],
    "maps": [
        "A map shows a piece of the earth as seen from above, only much smaller.",
        "The scale says how many steps on the ground belong to one step on the paper.",
        "Most maps have north at the top, but this is a habit and not a law.",
        "Lines that join places of equal height show where a slope is steep or gentle.",
        "A legend explains what the colours and signs on the map mean.",
        "No flat map can show the round earth without stretching some part of it.",
        "Sailors once found their way by the stars and wrote what they saw into their charts.",
    ],
    "plants": [
        "A green leaf makes sugar out of light, water and a gas from the air.",
        "Roots hold the plant in the ground and drink water with the minerals in it.",
        "Flowers attract bees with colour and scent, and the bees carry pollen to other flowers.",
        "A seed holds a small plant and enough food for its first days.",
        "Some seeds travel with the wind, others stick to the fur of animals.",
        "In autumn many trees drop their leaves to save water during the frost.",
        "A plant on a window sill bends towards the light.",
    ],
    "electricity": [
        "An electric current flows only when the circuit is closed.",
        "Metals carry the current well, while glass and rubber hardly let it pass.",
        "A battery pushes the current through the wire, much as a pump pushes water.",
        "If two lamps stand in one row, both go dark when one of them breaks.",
        "If each lamp has its own branch, the other one stays bright.",
        "A thin wire grows hot when a strong current passes through it.",
        "A fuse melts on purpose and so protects the house from fire.",
    ],
    "the human body": [
        "The heart is a muscle that pumps blood through the whole body, day and night.",
        "The blood brings oxygen from the lungs to every part of the body.",
        "Bones carry our weight and protect soft organs such as the brain.",
        "Muscles can only pull, so they work in pairs: one bends the arm, the other stretches it.",
        "During sleep the body repairs itself and the brain puts the day in order.",
        "We shiver when we are cold because moving muscles give off heat.",
        "Fresh food, movement and rest keep the body strong.",
    ],
    "rivers": [
        "A river begins at a spring and ends in a lake or in the sea.",
        "Fast water carries stones, slow water lays down sand and mud.",
        "On the outer side of a bend the bank is worn away, on the inner side it grows.",
        "Where a river meets the sea it often splits into many arms and forms a delta.",
        "Floods bring fertile mud to the fields, which is why early towns stood near rivers.",
        "A dam holds back the water and can drive a mill or a turbine.",
        "Clean rivers are full of insects, and the insects feed the fish.",
    ],
    "fractions": [
        "A fraction tells us into how many equal parts a whole is cut and how many of them we take.",
        "The number below the line names the parts, and the number above counts them.",
        "Two fractions are equal when they describe the same share of the whole.",
        "To add fractions we first cut both wholes into parts of the same size.",
        "Half of a half is a quarter.",
        "A share of one hundred parts is called a percentage.",
        "A fraction grows when its parts become fewer and larger.",
    ],
    "writing and print": [
        "The first signs were scratched into clay or stone, and only a few people could read them.",
        "Paper made writing cheap, because it can be made from rags and wood.",
        "In a printing press single letters of metal are put together to form a page.",
        "One page could now be printed a hundred times in a morning.",
        "Books became cheaper, more people learned to read, and news travelled faster.",
        "An alphabet needs only a few letters to write every word of a language.",
        "Libraries keep what earlier people knew for those who come later.",
    ],
    "weather": [
        "Wind is air that moves from a place of high pressure to a place of low pressure.",
        "Warm air rises because it is lighter than cold air.",
        "A thermometer measures heat, and a barometer measures the pressure of the air.",
        "Near the sea the summers are cooler and the winters milder than far inland.",
        "Fog is nothing but a cloud that touches the ground.",
        "Lightning is a huge spark, and thunder is the sound of the air that it heats.",
        "A forecast is a careful guess: the further ahead it looks, the less certain it is.",
    ],
}

OPENINGS = [
    "In this lesson we look at {topic} and at what it has to do with everyday life.",
    "Many people hear about {topic} at school, yet few could explain it to a child.",
    "{name} asked a good question in {place}: what should everybody know about {topic}?",
    "Imagine that you are in {place} with {name}, and the talk turns to {topic}.",
    "To understand {topic}, it helps to begin with what we can see for ourselves.",
]
LINKS = [
    "",
    "",
    "",
    "In other words: ",
    "First of all, ",
    "It is also worth knowing this. ",
    "Look closely. ",
    "As a rule, ",
]
CLOSINGS = [
    "So the main idea of {topic} is simple, even if the details take time to learn.",
    "Now close the book and tell {name} in three sentences what you remember about {topic}.",
    "In summary, {topic} can be observed almost anywhere, for example in {place}.",
    "Next time we will return to {topic} and try a small experiment in {place}.",
]
THINGS = ["apples", "books", "seeds", "stones", "candles", "pencils", "shells", "tickets", "boxes of nails"]
QUESTIONS = [
    "Which of these sentences about {topic} surprised you, and why?",
    "How could {name} show one fact about {topic} with things found in {place}?",
    "What would change if the first sentence about {topic} were not true?",
    "Can you draw a picture of {topic} and name three of its parts?",
]


def worked_sum(random: Random) -> str:
    """A word problem with its right answer."""
    name, thing = random.choice(NAMES), random.choice(THINGS)
    a, b = random.randint(2, 60), random.randint(2, 12)
    return random.choice(
        [
            f"Example: {name} has {a} {thing} and gets {b} more. Now there are {a} + {b} = {a + b} {thing}.",
            f"Example: {name} puts {a} {thing} into each of {b} bags. Together that makes {a} x {b} = {a * b} {thing}.",
            f"Example: {name} shares {a * b} {thing} among {b} friends. Each of them receives {a * b} : {b} = {a}.",
            f"Example: of {a + b} {thing} {name} gives away {b}. What is left is {a + b} - {b} = {a} {thing}.",
        ]
    )


def lesson(random: Random) -> str:
    """One document: title, opening, facts, a worked sum, questions, closing."""
    topic = random.choice(sorted(FACTS))
    slots = {"topic": topic, "name": random.choice(NAMES), "place": random.choice(PLACES)}
    facts = random.sample(FACTS[topic], random.randint(3, 6))
    linked = [_after(random.choice(LINKS), fact) for fact in facts]
    half = len(linked) // 2
    paragraphs = [
        f"Lesson {random.randint(1, 99)}: {topic}",
        " ".join([random.choice(OPENINGS).format(**slots), *linked[:half]]),
        " ".join(linked[half:]),
    ]
    if random.random() < 0.6:
        paragraphs.append(worked_sum(random))
    if random.random() < 0.5:
        questions = random.sample(QUESTIONS, 2)
        paragraphs.append("\n".join(f"{i}. {q.format(**slots)}" for i, q in enumerate(questions, 1)))
    paragraphs.append(random.choice(CLOSINGS).format(**slots))
    return "\n\n".join(paragraphs)


def _after(link: str, sentence: str) -> str:
    """`sentence` behind a link, in lower case where the link's own sentence goes on."""
    return link + (sentence[0].lower() + sentence[1:] if link.endswith((", ", ": ")) else sentence)
