"""Words of RULER's problems: everyday English, written down here so that a problem never changes with a library.

keys         "misty-lantern": an adjective and a noun; two adjectives once so many are needed that pairs run short
vocabulary   distinct words; two written as one ("lampriver") once the list runs short
"""

from random import Random

ADJECTIVES_TEXT = """
able amber ample ancient angry azure bare bent big bitter blank blunt bold brave brief bright brisk broad brown calm
careful cheap clean clear clever close cloudy coarse cold cool crisp curly damp dark dear deep dense dim dry dull
dusty eager early easy empty equal even exact faint fair faithful famous fancy fast fierce fine firm flat fond fresh
full gentle glad golden good grand gray great green happy hard heavy hidden high hollow honest huge humble icy ideal
idle jolly keen kind large late lazy lean light little lively local lone long loose loud low loyal lucky mellow
merry mild misty modest narrow neat new noble odd old open pale plain polite proud pure quick quiet rapid rare ready
red rich ripe rough round royal rusty safe salty sharp shiny short shy silent silver simple sleepy slim slow small
smooth soft solid sour spare steady steep stiff still stormy strange strong subtle sunny sweet swift tall tame
tender thick thin tidy tiny tired tough tranquil true vast vivid warm weak wet white wide wild windy wise witty
wooden yellow young
"""
NOUNS_TEXT = """
acorn anchor anvil apple apron arch arrow attic badge baker barge barn barrel basket beach beacon bell bench berry
blanket boat bottle boulder bowl branch bread brick bridge brook broom brush bucket button cabin cable camel candle
canoe canvas carpet cart castle cedar cellar chain chair chalk cherry chest chimney circle clay cliff clock cloud
clover coast coat compass copper cord cottage cradle crane creek crown cup curtain daisy desk ditch dock donkey door
dove drum duck eagle easel elbow engine falcon farm feather fence ferry fiddle field finger flag flask flute forest
fork fountain fox garden gate glacier glove goat goose grape gravel guitar hammer hammock harbor harp hat hazel
hedge helmet heron hill hinge hook horn horse island ivory jacket jar jewel kettle key kite kitten knife ladder lake
lamp lantern lemon letter lily lizard lock loom magnet maple marble market mast meadow melon mill mirror mitten moon
moss mountain mule needle nest oar oats olive onion orchard otter oven owl oyster paddle painter palace parrot path
peach pearl pebble pencil pepper piano pigeon pillow pine pipe plate plow plum pocket pond porch potato pump quilt
rabbit raft rail raven ribbon ridge ring river road robin rocket roof rope rose saddle sail sailor salmon scarf
shell ship shovel shelf sled smith spade sparrow spoon spring stable star statue stone stool stove street summit
table tailor temple tent thimble thread tiger torch tower trail train treasure tulip tunnel turtle valley vase
velvet village violin wagon walnut watch wheel whistle willow window wolf wool yarn
"""
VERBS_TEXT = """
accept admire arrive bake balance begin believe borrow bounce breathe build carry catch celebrate choose
climb collect compare cook count cross dance decide deliver discover divide draw dream drift drink earn enjoy escape
explore fetch find float follow forget gather grow guess hang help hold hope hunt imagine invent invite join juggle
jump knit knock laugh lead learn lift listen measure mend mix notice obey observe offer order paint polish prepare
promise pull push reach read remember repair rest return ride roam sail save search send sew shout sing sketch skip
sleep smile solve speak spin stand stay stir swim teach tell think throw travel trust turn twist visit wait wander
wash weave whisper wonder write
"""
ADJECTIVES, NOUNS, VERBS = (tuple(text.split()) for text in (ADJECTIVES_TEXT, NOUNS_TEXT, VERBS_TEXT))
WORDS = tuple(sorted({*ADJECTIVES, *NOUNS, *VERBS}))
PAIRS = len(ADJECTIVES) * len(NOUNS)


def keys(random: Random, count: int, taken: set[str] | None = None) -> list[str]:
    """`count` different keys, none of `taken`."""
    found: dict[str, None] = {}
    known = taken or set()
    firsts = 1 if 2 * (count + len(known)) < PAIRS else 2
    while len(found) < count:
        key = "-".join([*(random.choice(ADJECTIVES) for _ in range(firsts)), random.choice(NOUNS)])
        if key not in known:
            found[key] = None
    return list(found)


def vocabulary(random: Random, count: int) -> list[str]:
    """`count` different words, in any order."""
    if count <= len(WORDS):
        return random.sample(WORDS, count)
    found = dict.fromkeys(random.sample(WORDS, len(WORDS)))
    while len(found) < count:
        found["".join(random.choices(WORDS, k=2 + (len(found) > len(WORDS) ** 2 // 2)))] = None
    return list(found)
