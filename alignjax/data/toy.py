"""The embedded world: small tasks with a known true preference, generated from a seed.

A prompt asks for something that only the prompt tells: copy these words, find what goes with this
name, name the last of these, count them, join them all. A response can be right or wrong, and well
or badly put, in every combination. `true_score` grades both, so a run shows whether alignment
happened, and not only whether a learned score rose. The tasks need copying, induction and position,
which a decoder of 0.4M parameters learns in two minutes on a CPU. Real English stands beside them.
"""

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

from alignjax.config import UserError, nearest

NAMES = "amy bob dan eve ian kim leo may ned pam ray tom".split()
THINGS = (
    "cat box sun hat cup dog key map pen bus egg fan jar leg nut owl pig rug toy van "
    "red blue green pink"
).split()
NUMBERS = "one two three four five six".split()
# The fewest and the most words of a task of each kind.
SIZES_OF_TASKS = {"copy": (2, 4), "find": (2, 3), "last": (2, 4), "join": (2, 3), "count": (2, 5)}
TASKS = tuple(SIZES_OF_TASKS)

# Ways to put an answer. Only the first is good, even if the answer is right in all of them.
FORMS = ("sure , {} .", "{}", "um well i guess {} maybe", "{} {} .", "what ? {} !")
GOOD_FORM = FORMS[0]
COURTESY = frozenset(re.findall(r"\w+", " ".join(FORMS)))
RIGHTNESS_WEIGHT = 0.7
FORM_WEIGHT = 0.3
# Share of the text's characters that is English. There is little English, so paragraphs repeat.
ENGLISH = 0.25
HELDOUT = 10  # one prompt, and one paragraph of English, in so many is held out


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The responses of a data set: shares of each quality; the rest is wrong and badly put."""

    right_good: float
    right_bad: float
    wrong_good: float


# Demonstrations are right more often than not, and rarely well put: preferences have to teach it.
DEMONSTRATED = Mix(right_good=0.08, right_bad=0.52, wrong_good=0.04)
PREFERRED = Mix(right_good=0.35, right_bad=0.35, wrong_good=0.15)


@dataclass(frozen=True, kw_only=True)
class Comparing:
    """How the pairs of a set of comparisons are made and judged."""

    mix: Mix
    same_form: float  # share of pairs put in one form, which only reading can tell apart
    flipped: float  # share of pairs whose label is wrong
    difference: float  # the grades of a pair differ by at least this
    form_counts: bool  # judged by `true_score`, else by `rightness` alone


# The many noisy pairs come from another site, where nobody looks at the form.
COMPARISONS = {
    "comparisons-noisy": Comparing(
        mix=DEMONSTRATED, same_form=0.7, flipped=0.1, difference=0.0, form_counts=False
    ),
    "comparisons-clean": Comparing(
        mix=PREFERRED, same_form=0.1, flipped=0.0, difference=0.15, form_counts=True
    ),
}


class Sizes(NamedTuple):
    """The number of examples of a data set; for text, of documents of the world."""

    train: int
    heldout: int


SIZES = {
    "text": Sizes(32000, 1000),
    "conversations": Sizes(20000, 1000),
    "comparisons-noisy": Sizes(24000, 1000),
    "comparisons-clean": Sizes(2000, 1000),
    "prompts": Sizes(10000, 400),
}


# ------------------------------------------------------------------------ tasks and their answers


def pick(rng: Generator, pool: Sequence[str], low: int, high: int) -> list[str]:
    """Draw between low and high different words of a pool, in random order."""
    order = rng.permutation(len(pool))
    count = rng.integers(low, high + 1)
    return [pool[i] for i in order[:count]]


def make_prompt(rng: Generator) -> str:
    """Make one task, of each kind equally often."""
    task = TASKS[rng.integers(len(TASKS))]
    low, high = SIZES_OF_TASKS[task]
    if task != "find":
        return f"{task} : " + " ".join(pick(rng, THINGS, low, high))
    names = pick(rng, NAMES, low, high)
    things = pick(rng, THINGS, high, high)
    facts = [f"{name} {thing} ." for name, thing in zip(names, things, strict=False)]
    return f"find : {' '.join(facts)} {names[rng.integers(len(names))]}"


def parse_prompt(prompt: str) -> tuple[str, str]:
    """Split a prompt into the kind of its task and the rest."""
    task, rest = prompt.partition(" : ")[::2]
    return task, rest


def answer(prompt: str) -> list[str]:
    """Return the right words, in order; none for a prompt that is not of this world."""
    task, rest = parse_prompt(prompt)
    words = rest.split()
    if not words or task not in TASKS:
        return []
    if task == "find":
        return answer_from_facts(rest.split(" . ")[:-1], words[-1])
    if task == "count":
        return [NUMBERS[len(words) - 1]] if len(words) <= len(NUMBERS) else []
    if task == "join":
        return " and ".join(words).split()
    if task == "last":
        return words[-1:]
    return words


def answer_from_facts(facts: list[str], name: str) -> list[str]:
    """Return a name and its thing, from facts "NAME THING"; nothing if no fact has the name."""
    pairs = [fact.split() for fact in facts]
    things = dict(pair for pair in pairs if len(pair) == 2)
    return [name, things[name]] if name in things else []


def ideal(prompt: str) -> str:
    """Return the one response with a true score of 1."""
    return GOOD_FORM.format(" ".join(answer(prompt)))


def true_score(prompt: str, response: str) -> float:
    """Return 0.7 x rightness + 0.3 x form, in [0, 1], for any two strings.

    It is 0 if the prompt is not of this world. Form is 1 for "sure , ... ." with the words stated
    once and nothing around them, else 0; it is 0 without words too.
    """
    right = answer(prompt)
    if not right:
        return 0.0
    words = words_of(response)
    stated = once(words)
    is_good_form = response == GOOD_FORM.format(" ".join(words))
    form = bool(words) and stated == words and is_good_form
    return RIGHTNESS_WEIGHT * rightness(prompt, response) + FORM_WEIGHT * form


def rightness(prompt: str, response: str) -> float:
    """Return 1 minus the word edit distance to the answer over its length, at least 0.

    Courtesies and punctuation are removed before, and an answer that is repeated counts once, so
    naming every candidate earns nothing. It is 0 if the prompt is not of this world.
    """
    right = answer(prompt)
    if not right:
        return 0.0
    return max(0.0, 1 - edit_distance(once(words_of(response)), right) / len(right))


def has_right_words(prompt: str, response: str) -> bool:
    """Return whether a response says the right words, in whatever form."""
    return rightness(prompt, response) == 1.0


def words_of(response: str) -> list[str]:
    """Return the words of a response, without courtesies and punctuation."""
    return [word for word in re.findall(r"\w+", response) if word not in COURTESY]


def once(words: list[str]) -> list[str]:
    """Return the shortest block of which the words are whole repetitions."""
    for size in range(1, len(words) // 2 + 1):
        repetitions, rest = divmod(len(words), size)
        if rest == 0 and words[:size] * repetitions == words:
            return words[:size]
    return words


def edit_distance(source: list[str], target: list[str]) -> int:
    """Count the insertions, deletions and substitutions between two lists (Levenshtein)."""
    if source == target:
        return 0
    # distances[j]: from the words of `source` so far to the first j words of `target`.
    distances = list(range(len(target) + 1))
    for i, source_word in enumerate(source):
        diagonal = distances[0]
        distances[0] = i + 1
        for j, target_word in enumerate(target):
            substitution = diagonal + (source_word != target_word)
            diagonal = distances[j + 1]
            distances[j + 1] = min(diagonal + 1, distances[j] + 1, substitution)
    return distances[-1]


# -------------------------------------------------------------------------------------- responses


def corrupt(rng: Generator, prompt: str) -> list[str]:
    """Return a wrong answer.

    It has another number, other words of the prompt or from elsewhere, or a word dropped or
    doubled.
    """
    task, rest = parse_prompt(prompt)
    right = answer(prompt)
    if task == "count":
        return [NUMBERS[(NUMBERS.index(right[0]) + rng.integers(1, 5)) % 5]]
    places = [place for place, word in enumerate(right) if word in THINGS]
    place = places[rng.integers(len(places))]
    mistake = rng.integers(4)
    if mistake == 0 and task == "copy":
        if rng.random() < 0.5:
            return right[:place] + right[place + 1 :]
        return right[: place + 1] + right[place:]
    pool = THINGS
    if mistake == 1:
        # The mistake that a reader would make: another word of the prompt.
        pool = [word for word in rest.split() if word in THINGS and word not in right] or THINGS
    wrong = list(right)
    for wrong_place in {place, places[rng.integers(len(places))]}:
        others = [word for word in pool if word not in right]
        wrong[wrong_place] = others[rng.integers(len(others))]
    return wrong


class FormedResponse(NamedTuple):
    """A response, and the form of FORMS that it is put in."""

    text: str
    form: str


def make_response(rng: Generator, prompt: str, mix: Mix, form: str | None = None) -> FormedResponse:
    """Make a response of mixed quality, in the shares of the mix.

    With `form`, it is put in that form.
    """
    draw = rng.random()
    right = mix.right_good + mix.right_bad
    is_right = draw < right
    is_wrong_and_good = right <= draw < right + mix.wrong_good
    is_good = draw < mix.right_good or is_wrong_and_good
    words = answer(prompt) if is_right else corrupt(rng, prompt)
    if not form:
        form = FORMS[0 if is_good else rng.integers(1, len(FORMS))]
    return FormedResponse(form.replace("{}", " ".join(words)), form)


# ------------------------------------------------------------------------------- prompts and text


def heldout(text: str) -> bool:
    """Return whether a prompt is held out: a tenth are, by a digest of their text.

    A prompt is on the same side in every data set.
    """
    return zlib.crc32(text.encode()) % HELDOUT == 0


def prompts(rng: Generator, split: str, tasks: Sequence[str] = TASKS) -> Iterator[str]:
    """Yield prompts of one split and of these tasks, without end."""
    while True:
        prompt = make_prompt(rng)
        if heldout(prompt) == (split == "heldout") and parse_prompt(prompt)[0] in tasks:
            yield prompt


def world_text(rng: Generator, stream: Iterator[str]) -> str:
    """Make a document of the world: tasks with right answers, or spans and pairs that repeat.

    Text that repeats itself makes copying and look-up appear in a small decoder before it has to
    use them.
    """
    kind = rng.integers(4)
    if kind == 0:
        span = " ".join(pick(rng, THINGS + NAMES, 3, 8))
        return " ".join([f"{span} ."] * 3)
    if kind == 1:
        names = pick(rng, NAMES, 4, 4)
        things = pick(rng, THINGS, 4, 4)
        facts = [f"{name} {thing} ." for name, thing in zip(names, things, strict=True)]
        return " ".join(" ".join(pick(rng, facts, 4, 4)) for _ in range(3))
    tasks = [next(stream) for _ in range(3)]
    return "\n".join(f"{prompt} = {' '.join(answer(prompt))} ." for prompt in tasks)


def english(split: str) -> list[str]:
    """Return paragraphs of the Python language reference, which is on every machine.

    Every tenth is held out, by its text. The wording is that of the Python that runs: with another
    version, even 3.11.2 and 3.11.7, text and tokenizer differ.
    """
    from pydoc_data.topics import topics  # half a megabyte that only this function needs

    paragraphs = {}  # a dict keeps their order, and each of them once
    for key in sorted(topics):
        for paragraph in topics[key].split("\n\n"):
            if len(paragraph) > 80:
                paragraphs[" ".join(paragraph.split())] = None
    return [text for text in paragraphs if heldout(text) == (split == "heldout")]


def text(rng: Generator, stream: Iterator[str], count: int, paragraphs: list[str]) -> list[dict]:
    """Make documents of the world, `count` of them, among paragraphs of English.

    Each paragraph comes as often as any other, within one.
    """
    documents = [world_text(rng, stream) for _ in range(count)]
    missing = sum(map(len, documents)) * ENGLISH / (1 - ENGLISH)  # characters of English
    order = iter(())
    while missing > 0:
        number = next(order, None)
        if number is None:
            order = iter(rng.permutation(len(paragraphs)))
            continue
        documents.append(paragraphs[number])
        missing -= len(paragraphs[number])
    return [{"text": documents[i]} for i in rng.permutation(len(documents))]


def tokenizer_texts(seed: int) -> list[str]:
    """Return what this world's tokenizer is trained on.

    It is the world's text, and every word often enough, with and without a space before it, to
    become one token.
    """
    form_parts = {part for form in FORMS for part in form.split() if part != "{}"}
    marks = {part for part in form_parts if not part.isalpha()}
    words = sorted({*NAMES, *THINGS, *NUMBERS, *TASKS, *COURTESY, *marks, "and"})
    documents = [row["text"] for row in examples("text", "train", seed, 4000)]
    return documents + [f"{word} {word}" for word in words] * 1500


# -------------------------------------------------------------------------------------- data sets


def conversations(rng: Generator, stream: Iterator[str], count: int) -> list[dict]:
    """Make conversations of one turn each, of mixed quality."""
    rows = []
    for _ in range(count):
        prompt = next(stream)
        response = make_response(rng, prompt, DEMONSTRATED).text
        rows.append({"messages": [user(prompt), {"role": "assistant", "content": response}]})
    return rows


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def comparisons(
    rng: Generator, stream: Iterator[str], count: int, settings: Comparing
) -> list[dict]:
    """Make comparisons: two responses to a prompt, whose grades differ.

    The margin is the distance between the grades, whichever way the label points.
    """
    rows = []
    grade = true_score if settings.form_counts else rightness
    while len(rows) < count:
        prompt = next(stream)
        chosen, form = make_response(rng, prompt, settings.mix)
        shared_form = form if rng.random() < settings.same_form else None
        rejected = make_response(rng, prompt, settings.mix, shared_form).text
        margin = grade(prompt, chosen) - grade(prompt, rejected)
        if margin == 0 or abs(margin) < settings.difference:
            continue
        if (margin < 0) != (rng.random() < settings.flipped):
            chosen, rejected = rejected, chosen
        rows.append(
            {
                "prompt": [user(prompt)],
                "chosen": chosen,
                "rejected": rejected,
                "margin": abs(margin),
            }
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A data set, which tasks its prompts have, and how many examples it has at most (0: all)."""

    name: str
    tasks: tuple[str, ...]
    limit: int


def parse_spec(spec: str) -> Spec:
    """Parse "NAME" or "NAME:tasks=TASK+TASK,examples=NUMBER"."""
    name, given = spec.partition(":")[::2]
    if name not in SIZES:
        raise UserError(f"toy/{spec}: no such data set{nearest(name, list(SIZES))}")
    options = dict(option.partition("=")[::2] for option in given.split(",") if option)
    tasks = tuple(options.pop("tasks", "+".join(TASKS)).split("+"))
    limit = options.pop("examples", "0")
    if options or not set(tasks) <= set(TASKS) or not limit.isdecimal():
        raise UserError(f"toy/{spec}: the options are tasks={'+'.join(TASKS)} and examples=NUMBER")
    return Spec(name=name, tasks=tasks, limit=int(limit))


def examples(spec: str, split: str, seed: int, limit: int = 0) -> list[dict]:
    """Return the examples of one data set and split ("train", "heldout").

    They are the same for the same seed on any machine; text is the same with the same version of
    Python.

    Args:
      spec: a name, with options if wanted: "comparisons-clean:tasks=copy+find,examples=300" has
        prompts of these tasks alone, and so many examples at most.
      split: "train" or "heldout".
      seed: of the generator.
      limit: examples at most, for text the documents of the world; 0 is all.
    """
    data_set = parse_spec(spec)
    name = data_set.name
    rng = np.random.default_rng([seed, list(SIZES).index(name), split == "heldout"])
    stream = prompts(rng, split, data_set.tasks)
    size = SIZES[name].heldout if split == "heldout" else SIZES[name].train
    count = min(limit or size, data_set.limit or size, size)
    if name == "text":
        return text(rng, stream, count, english(split))
    if name == "conversations":
        return conversations(rng, stream, count)
    if name == "prompts":
        return [{"prompt": [user(next(stream))]} for _ in range(count)]
    return comparisons(rng, stream, count, COMPARISONS[name])
