"""Short children's tales from a probabilistic grammar: the corpus that ships inside tinylm.

Made, not downloaded: training starts offline, no tale can be learned by heart, and every text has
exactly one derivation, so log p is known and the loss has an exact floor (tests parse tales back,
and compute the entropy). Names, pronouns and facts agree across sentences: that is what a model has
to learn. The idea is from TinyStories (Eldan and Li, 2023, arXiv:2305.07759), the words are ours.
The forms of a symbol are prefix-free, which `Grammar` checks, and a sequence of prefix-free codes
reads in one way only (Cover and Thomas, Elements of Information Theory, section 5.1). A tale costs
about 30 microseconds. A changed word changes every loss that was measured: update the golden tale,
and the figures in configs and README.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Slot(NamedTuple):
    """A place in a text where a symbol is said: `{symbol}`, `{Symbol}` (with a capital) or
    `{symbol.fact}`.

    The first slot of a symbol draws one of its forms, later ones repeat it.
    """

    symbol: str
    fact: str


# What a form is made of: words, and slots for other symbols.
Parts = tuple[str | Slot, ...]
# The facts of each symbol that is drawn so far.
Env = dict[str, dict[str, str]]


class Form(NamedTuple):
    """One way to say a symbol: plain words with facts, or words and slots without facts."""

    parts: Parts
    facts: dict[str, str]
    log_prob: float

    def say(self, slot: Slot) -> Parts:
        return (self.facts[slot.fact],) if self.facts else self.parts


class Choice:
    """Weighted forms between bars: `3* text` has weight 3 instead of 1, `text; fact=words` carries
    facts.
    """

    def __init__(self, source: str):
        texts = []
        weights = []
        for weighted in source.split("|"):
            count, _, text = weighted.strip().rpartition("* ")
            texts.append(text)
            weights.append(int(count or 1))
        self.total = sum(weights)
        self.forms: list[Form] = []
        # As the faces of a die: each form as often as its weight says.
        self.faces: list[Form] = []
        for text, weight in zip(texts, weights, strict=True):
            form = _form(text, math.log(weight / self.total))
            self.forms.append(form)
            self.faces += [form] * weight


class Symbol(NamedTuple):
    """The forms of a symbol.

    Attributes:
      key: the fact of another symbol that decides between the tables, where there are several.
      tables: the forms for each value of that fact; without a key, those for "".
    """

    key: Slot | None
    tables: dict[str, Choice]

    @property
    def forms(self) -> list[Form]:
        """The forms of all tables."""
        return [form for choice in self.tables.values() for form in choice.forms]


def _form(source: str, log_prob: float) -> Form:
    """Read a form, such as "kite; use=fly" or "{He} lived {place}."."""
    text, *pairs = source.split("; ")
    # Words at even places, names of slots at odd ones.
    pieces = re.split(r"\{([\w.]+)\}", text)
    parts: list[str | Slot] = []
    for number, piece in enumerate(pieces):
        if number % 2:
            parts.append(_slot(piece))
        elif piece:
            parts.append(piece)
    facts: dict[str, str] = {}
    if len(pieces) == 1:
        facts["text"] = text
        for pair in pairs:
            fact, words = pair.split("=")
            facts[fact] = words
    # A plain form has each fact with a capital too.
    capitals = {fact.capitalize(): words[0].upper() + words[1:] for fact, words in facts.items()}
    return Form(tuple(parts), facts | capitals, log_prob)


def _slot(source: str) -> Slot:
    """Read a slot without its braces."""
    symbol, _, fact = source.partition(".")
    if not fact:
        fact = "Text" if symbol.istitle() else "text"
    return Slot(symbol.lower(), fact)


def _symbol(source: str, key: str) -> Symbol:
    """Read the forms of a symbol; with a key, its tables between slashes."""
    source = " ".join(source.split())
    if not key:
        return Symbol(None, {"": Choice(source)})
    tables = {}
    for table in source.split(" / "):
        value, forms = table.split(": ", 1)
        tables[value] = Choice(forms)
    return Symbol(_slot(key), tables)


class Grammar:
    """A grammar without recursion, in which every text has one derivation."""

    def __init__(self, symbols: Mapping[str, str], start: str):
        """Read a grammar.

        Args:
          symbols: the forms of each symbol (see `Choice` and `Slot`). Under a key `symbol by
            other.fact` they are tables, `value: forms / value: forms`, of which the fact of the
            other symbol, drawn before, takes one.
          start: the symbol that stands for a whole text.

        Raises:
          ValueError: one form could begin another, so a text might be read in two ways.
        """
        self._start: Parts = (_slot(start),)
        self._symbols: dict[str, Symbol] = {}
        for head, source in symbols.items():
            name, _, key = head.partition(" by ")
            self._symbols[name] = _symbol(source, key)
        for symbol in self._symbols.values():
            for choice in symbol.tables.values():
                self._check(choice)

    def _check(self, choice: Choice) -> None:
        """Raise ValueError where one of some forms may begin another."""
        for one, other in itertools.combinations(choice.forms, 2):
            if self._alike(one.parts, other.parts):
                raise ValueError(f"one form may begin the other: {one.parts}, {other.parts}")

    def sample(self, number: int) -> tuple[str, float]:
        """Return a text and its log p (nats); each choice takes a digit of `number`, so uniform
        bits sample p.
        """
        said = []
        log_prob = 0.0
        env: Env = {}
        # A stack, so the next part is its last one.
        todo = list(self._start)
        while todo:
            part = todo.pop()
            if isinstance(part, str):
                said.append(part)
            elif part.symbol in env:
                said.append(env[part.symbol][part.fact])
            else:
                choice = self._choice(part, env)
                number, digit = divmod(number, choice.total)
                form = choice.faces[digit]
                env[part.symbol] = form.facts
                log_prob += form.log_prob
                todo += form.say(part)[::-1]
        return "".join(said), log_prob

    def _choice(self, slot: Slot, env: Env) -> Choice:
        """Return the forms from which a symbol is drawn."""
        if slot.fact.lower() != "text":
            raise ValueError(f"{{{slot.symbol}.{slot.fact}}} comes before {{{slot.symbol}}}")
        key, tables = self._symbols[slot.symbol]
        return tables[env[key.symbol][key.fact] if key else ""]

    def _alike(self, one: Parts, other: Parts, agree: bool = True) -> bool:
        """Return whether a text of one may begin a text of the other; in doubt, that it may.

        Args:
          one: the rest of one form.
          other: the rest of another form.
          agree: whether the same slot says the same in both, which holds until a symbol with
            facts is drawn in one of them.
        """
        # Leave out what both begin with.
        while one and other and one[0] == other[0] and (agree or isinstance(one[0], str)):
            one = one[1:]
            other = other[1:]
        if not one or not other:
            return True
        first = one[0]
        second = other[0]
        if isinstance(first, Slot):
            return any(
                self._alike(form.say(first) + one[1:], other, agree and not form.facts)
                for form in self._symbols[first.symbol].forms
            )
        if isinstance(second, Slot) or first.startswith(second):
            return self._alike(other, one, agree)
        if not second.startswith(first):
            return False
        rest = second[len(first) :]
        return self._alike(one[1:], (rest, *other[1:]), agree)


_SYMBOLS = {
    "tale": """{opening} {own} {lose} {meet} {fetch} {friends} | {opening} {dream} {fail} {teach} {learn} {thanks}
        | {opening} {find} {hear} {carry} {reunite} {gift} | {opening} {quarrel} {claim} {break} {mend} {share}""",
    "opening": """3* Once upon a time, there was a {trait} little {kind} named {name}. {He} lived {place}.
        | 3* Once upon a time, a {trait} {kind} named {name} lived {place}.
        | {Place} lived a {trait} {kind} named {name}.
        | 2* Long ago, {place}, there lived a {trait} little {kind} named {name}.""",
    "own": """2* {name} had a {color} {toy} and loved to {toy.use} it. | {name} got a {color} {toy} from {his} {giver}.
        | Every day, {he} played with a {color} {toy}.""",
    "lose": """2* One {day}, the {toy} {spot}. | One {day}, it {spot}, and {name} felt {mood}.
        | But on a {day}, it {spot}.""",
    "meet": """2* It was too {spot.far} for {him}. "I can help," said a {helper}. | Soon a {helper} came by.
        | "Why are you so {mood}?" asked a {helper}. "My {toy} is {spot.at}," said {name}.""",
    "fetch": """2* The {helper} {helper.go} and brought it back. | At once, the {helper} {helper.go} and got it.
        | Then the {helper} {helper.go} and came back with the {color} {toy}.""",
    "friends": "2* {close} | From that day on, {name} and the {helper} were best friends.",
    "dream": """2* More than anything, {name} wanted to {skill}. | "I wish I could {skill}," said {name}.
        | Every night, {name} dreamed that {he} could {skill}.""",
    "fail": """2* But when {he} tried, {he} {skill.fail}. | {He} tried, but always {skill.fail}.
        | One {day}, {he} tried, but {he} {skill.fail} and felt {mood}.""",
    "teach": """2* "I will teach you," said a wise {teacher}. | Then {name} met a {teacher} who could {skill}.
        | "Do not be {mood}," said a {teacher}. "I will show you how to {skill}." """,
    "learn": """2* After {number} days, {name} could {skill}! | They practiced all {time}, until {name} could {skill}.
        | The {teacher} helped {him} every {time}, and soon {he} could {skill} very well.""",
    "thanks": "2* {close} | To say thank you, {name} gave the {teacher} a {treat}.",
    "find": """2* One {day}, {name} heard a soft cry behind a {hide}. It was a {baby}.
        | One {day}, {name} found a {baby} behind a {hide}. | On a {day}, {he} saw a {baby} next to a {hide}.""",
    "hear": """2* "I lost my mother," it said and looked {mood}. | "Please help me find my {baby.home}," it said.
        | "Why are you so {mood}?" asked {name}. "I am lost," it said.""",
    "carry": """2* {name} carried it {way} to its {baby.home}. | So they went {way} until they saw the {baby.home}.
        | "I will take you home," said {name}, and they went {way} to the {baby.home}.""",
    "reunite": """2* Its mother was so happy that she gave {name} a {baby.gift}.
        | There, its mother gave {name} a {baby.gift}. | {name} got a {baby.gift} from its happy mother.""",
    "gift": "2* {close} | After that, the {baby} often came to play with {name}.",
    "quarrel": """2* One {day}, {name} and {his} friend {friend} found a {color} {toy}.
        | {name} had a friend named {friend}. One {day}, they found a {color} {toy}.""",
    "claim": """2* "It is mine!" said {name}. "No, I saw it first!" said {friend}. | Both wanted to {toy.use} it.
        | "Let me {toy.use} it!" said {friend}. "No, let me!" said {name}.""",
    "break": """2* They pulled until it {ruin}. | They pulled so hard that the {toy} {ruin}.
        | Then the {toy} {ruin}, and they felt {mood}.""",
    "mend": """2* "You can share," said {his} {giver}. So they {ruin.fix} and took turns.
        | So they {ruin.fix} and took turns. | "I am sorry," said {name}. They {ruin.fix}, and {friend} went first.""",
    "share": "2* {close} | From that day on, {name} and {friend} always shared.",
    "close": """2* Everyone {place.all} said that {name} was the {trait.most} {kind} of all.
        | 2* That night, the {trait} little {kind} slept very well. | Now {name} was the happiest {kind} {place.all}.
        | {name} told {his} {giver} all about it and went to bed with a smile.""",
    "kind": """2* girl; who=she | 2* boy; who=he | mouse; who=she | kitten; who=she | fox; who=she | rabbit; who=he
        | bear; who=he | puppy; who=he""",
    "he by kind.who": "she: she / he: he",
    "his by kind.who": "she: her / he: his",
    "him by kind.who": "she: her / he: him",
    "name by kind.who": """she: Lily | Mia | Sue | Anna | Rose | Lucy | Emma | Nora | Zoe | Amy | Clara | Jane | Dot
        | Tilly / he: Tom | Ben | Max | Sam | Leo | Jack | Tim | Noah | Finn | Otto | Hugo | Paul | Pip | Rusty""",
    "trait": """kind; most=kindest | brave; most=bravest | clever; most=cleverest | gentle; most=gentlest
        | merry; most=merriest | friendly; most=friendliest | polite; most=politest | funny; most=funniest""",
    "place": """in a small village; all=in the village | by the blue sea; all=by the sea | on a farm; all=on the farm
        | on a green hill; all=on the hill | in a quiet valley; all=in the valley | in a busy town; all=in the town
        | on a tiny island; all=on the island | near a deep forest; all=near the forest""",
    "friend": "Kate | Fred | Molly | Bill | Ruby | Dan | Ella | Peter",
    "giver": "mother | father | grandmother | grandfather | sister | brother | uncle | aunt",
    "day": "2* sunny day | 2* windy day | cold day | warm day | bright morning | quiet evening",
    "time": "day | morning | afternoon | week",
    "mood": "2* sad | worried | upset | gloomy",
    "treat": "cookie | pear | plum | bun | carrot | berry | cake | flower",
    "number": "three | five | seven | ten",
    "color": "2* red | 2* blue | green | yellow | golden | pink | silver | purple | brown | white",
    "toy": """2* kite; use=fly; shape=flat | flag; use=wave; shape=flat | hat; use=wear; shape=flat
        | scarf; use=wear; shape=flat | 2* ball; use=bounce; shape=round | drum; use=play; shape=round
        | top; use=spin; shape=round | bell; use=ring; shape=round""",
    "spot by toy.shape": """flat: fell into the pond; at=in the pond; far=deep
        | landed on the roof; at=on the roof; far=high | 2* got stuck in a tree; at=in the tree; far=high
        / round: fell into the pond; at=in the pond; far=deep | rolled into a hole; at=in the hole; far=dark""",
    "helper by spot.at": """in the pond: duck; go=swam out | frog; go=jumped in | turtle; go=dived down
        / in the hole: mole; go=dug down | badger; go=crawled in | snake; go=slid down / on the roof: pigeon; go=flew up
        | cat; go=jumped up / in the tree: squirrel; go=climbed up | crow; go=flew up | monkey; go=swung up""",
    "skill": """swim; art=water; fail=went under | dive; art=water; fail=swallowed water | sing; art=music; fail=croaked
        | dance; art=steps; fail=fell over | skate; art=steps; fail=slipped | bake; art=food; fail=burned the bread
        | cook; art=food; fail=spilled the soup | whistle; art=music; fail=blew too hard""",
    "teacher by skill.art": """water: seal | swan | beaver / music: robin | lark | cricket / steps: goose | pony | crane
        / food: hen | goat | pig""",
    "baby": """baby bird; home=nest; gift=feather | baby bee; home=hive; gift=jar of honey
        | lamb; home=barn; gift=ball of wool | baby squirrel; home=tree; gift=nut | baby crab; home=cave; gift=shell
        | chick; home=coop; gift=warm egg""",
    "hide": "bush | rock | fence | log | gate | barrel",
    "way": "over the bridge | along the river | through the tall grass | past the mill | up the road",
    "ruin": "fell in the mud; fix=washed it | came apart; fix=mended it | got wet; fix=dried it",
}

_GRAMMAR = Grammar(_SYMBOLS, start="tale")


def tale(index: int, seed: int = 0) -> tuple[str, float]:
    """Return tale number `index` of a seed and its log p in nats; the same on every machine and
    Python.
    """
    digest = hashlib.blake2b(
        f"{seed} {index}".encode(), digest_size=64, person=b"tinylm.tales"
    ).digest()
    return _GRAMMAR.sample(int.from_bytes(digest, "big"))


def tales(split: str, count: int, seed: int = 0) -> Iterator[tuple[str, float]]:
    """Yield the first `count` tales of a split, "train" or "valid", in index order, each with its
    log p in nats.
    """
    if split not in ("train", "valid"):
        raise ValueError(f"split={split!r} must be 'train' or 'valid'.")
    every = (tale(index, seed) for index in itertools.count())
    return itertools.islice(
        (pair for pair in every if is_valid(pair[0]) == (split == "valid")), count
    )


def is_valid(text: str) -> bool:
    """Whether a tale is in the validation split, about 1 in 20; the text alone decides, so no tale
    is in both.
    """
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % 20 == 0
