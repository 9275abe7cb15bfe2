"""The embedded world: small tasks with a known true preference, generated from a seed, with real English beside them.

A prompt asks for something that only the prompt tells (copy these words, what goes with this name, the last of these,
how many, all of them joined); a response can be right or wrong, and well or badly put, in every combination.
`true_score` grades both, so a run can see whether alignment happened rather than whether a learned score rose. The
tasks need copying, induction and position, which a decoder of 0.4M parameters learns in two minutes on a CPU.
"""

import re
import zlib

import numpy as np

from alignjax.config import UserError, nearest

NAMES = "amy bob dan eve ian kim leo may ned pam ray tom".split()
THINGS = "cat box sun hat cup dog key map pen bus egg fan jar leg nut owl pig rug toy van red blue green pink".split()
NUMBERS = "one two three four five six".split()
SIZES_OF_TASKS = {"copy": (2, 4), "find": (2, 3), "last": (2, 4), "join": (2, 3), "count": (2, 5)}
TASKS = tuple(SIZES_OF_TASKS)

# Ways to put an answer. The first is the good one; none other is, though the answer be right.
FORMS = ("sure , {} .", "{}", "um well i guess {} maybe", "{} {} .", "what ? {} !")
COURTESY = frozenset(re.findall(r"\w+", " ".join(FORMS)))
RIGHT_GOOD, RIGHT_BAD, WRONG_GOOD = (
    0.35,
    0.25,
    0.20,
)  # shares of responses; the rest is wrong and badly put
RIGHTNESS_WEIGHT, FORM_WEIGHT = 0.7, 0.3
SAME_FORM = 0.7  # share of comparisons put in one form, which only reading can tell apart
FLIPPED = 0.1  # share of noisy comparisons whose label is wrong
CLEAN_DIFFERENCE = 0.15  # clean comparisons differ by at least this in true score
ENGLISH = (
    0.25  # share of the text's characters that is English; it is small, so its paragraphs come back
)
HELDOUT = 10  # one prompt, and one paragraph of English, in so many is held out

# How many examples there are, of train and of heldout; of text, how many documents of the world.
SIZES = {
    "text": (32000, 1000),
    "conversations": (20000, 1000),
    "comparisons-noisy": (24000, 1000),
    "comparisons-clean": (1000, 1000),
    "prompts": (10000, 400),
}


def pick(rng, pool, low: int, high: int) -> list[str]:
    """Between low and high different words of the pool, in random order."""
    return [pool[i] for i in rng.permutation(len(pool))[: rng.integers(low, high + 1)]]


def make_prompt(rng) -> str:
    """One task, every kind equally often."""
    task = TASKS[rng.integers(len(TASKS))]
    low, high = SIZES_OF_TASKS[task]
    if task == "find":
        names = pick(rng, NAMES, low, high)
        facts = [f"{n} {t} ." for n, t in zip(names, pick(rng, THINGS, high, high), strict=False)]
        return f"find : {' '.join(facts)} {names[rng.integers(len(names))]}"
    return f"{task} : " + " ".join(pick(rng, THINGS, low, high))


def answer(prompt: str) -> list[str]:
    """The right words, in order; none for a prompt that is not of this world."""
    task, _, rest = prompt.partition(" : ")
    words = rest.split()
    if not words or task not in TASKS:
        return []
    if task == "find":
        facts = dict(fact for fact in (f.split() for f in rest.split(" . ")[:-1]) if len(fact) == 2)
        return [words[-1], facts[words[-1]]] if words[-1] in facts else []
    if task == "count":
        return [NUMBERS[len(words) - 1]] if len(words) <= len(NUMBERS) else []
    if task == "join":
        return " and ".join(words).split()
    return {"copy": words, "last": words[-1:]}[task]


def ideal(prompt: str) -> str:
    """The one response with a true score of 1."""
    return FORMS[0].format(" ".join(answer(prompt)))


def true_score(prompt: str, response: str) -> float:
    """In [0, 1]: 0.7 x rightness + 0.3 x form, for any two strings; 0 if the prompt is not of this world.

    Rightness is 1 less the word edit distance to the answer over the answer's length, at least 0, once courtesies and
    punctuation are gone and an answer said over and over counts once; so naming every candidate earns nothing. Form is 1
    for "sure , ... ." with the words said once and nothing around them, else 0; without words there is no form either.
    """
    right = answer(prompt)
    if not right:
        return 0.0
    words = [w for w in re.findall(r"\w+", response) if w not in COURTESY]
    said = once(words)
    rightness = max(0.0, 1 - edit_distance(said, right) / len(right))
    form = bool(words) and said == words and response == FORMS[0].format(" ".join(words))
    return RIGHTNESS_WEIGHT * rightness + FORM_WEIGHT * form


def once(words: list[str]) -> list[str]:
    """The shortest block that the words are whole repetitions of."""
    n = len(words)
    return next(
        (words[:k] for k in range(1, n // 2 + 1) if n % k == 0 and words[:k] * (n // k) == words),
        words,
    )


def edit_distance(a: list[str], b: list[str]) -> int:
    """Insertions, deletions and substitutions that turn a into b (Levenshtein)."""
    if a == b:
        return 0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        diagonal, row[0] = row[0], i + 1
        for j, y in enumerate(b):
            diagonal, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, diagonal + (x != y))
    return row[-1]


def corrupt(rng, prompt: str) -> list[str]:
    """A wrong answer: another number, another word of the prompt or from elsewhere, a word dropped or said twice."""
    task, _, rest = prompt.partition(" : ")
    right = answer(prompt)
    if task == "count":
        return [NUMBERS[(NUMBERS.index(right[0]) + rng.integers(1, 5)) % 5]]
    places = [i for i, word in enumerate(right) if word in THINGS]
    i, kind = places[rng.integers(len(places))], rng.integers(4)
    if kind == 0 and task == "copy":
        return right[:i] + right[i + 1 :] if rng.random() < 0.5 else right[: i + 1] + right[i:]
    pool = THINGS
    if kind == 1:  # the mistake that a reader would make
        pool = [w for w in rest.split() if w in THINGS and w not in right] or THINGS
    wrong = list(right)
    for j in {i, places[rng.integers(len(places))]}:
        others = [w for w in pool if w not in right]
        wrong[j] = others[rng.integers(len(others))]
    return wrong


def make_response(rng, prompt: str, form: str | None = None) -> tuple[str, str]:
    """(response, form): of mixed quality, in the shares at the top of this file, or in the form that is given."""
    u = rng.random()
    right = u < RIGHT_GOOD + RIGHT_BAD
    good = u < RIGHT_GOOD or RIGHT_GOOD + RIGHT_BAD <= u < RIGHT_GOOD + RIGHT_BAD + WRONG_GOOD
    words = " ".join(answer(prompt) if right else corrupt(rng, prompt))
    form = form or FORMS[0 if good else rng.integers(1, len(FORMS))]
    return form.replace("{}", words), form


def heldout(text: str) -> bool:
    """A tenth of all prompts, by a digest of their text: a prompt is on the same side in every data set."""
    return zlib.crc32(text.encode()) % HELDOUT == 0


def prompts(rng, split: str, tasks=TASKS):
    """Endless prompts of one split and of these tasks."""
    while True:
        prompt = make_prompt(rng)
        if heldout(prompt) == (split == "heldout") and prompt.partition(" : ")[0] in tasks:
            yield prompt


def world_text(rng, stream) -> str:
    """A document of the world: tasks with their right answers, or spans and pairs that repeat.

    Text that repeats itself makes copying and look-up appear in a small decoder before it has to use them.
    """
    kind = rng.integers(4)
    if kind == 0:
        span = " ".join(pick(rng, THINGS + NAMES, 3, 8))
        return " ".join([f"{span} ."] * 3)
    if kind == 1:
        facts = [
            f"{n} {t} ."
            for n, t in zip(pick(rng, NAMES, 4, 4), pick(rng, THINGS, 4, 4), strict=True)
        ]
        return " ".join(" ".join(pick(rng, facts, 4, 4)) for _ in range(3))
    return "\n".join(
        f"{prompt} = {' '.join(answer(prompt))} ." for prompt in (next(stream) for _ in range(3))
    )


def english(split: str) -> list[str]:
    """Paragraphs of the Python language reference, which is on every machine; every tenth is held out, by its text.

    Their wording is that of the Python that runs: with another version, 3.11.2 and 3.11.7 too, text and tokenizer differ.
    """
    from pydoc_data.topics import topics  # half a megabyte that only this needs

    found = {
        " ".join(p.split()): None
        for key in sorted(topics)
        for p in topics[key].split("\n\n")
        if len(p) > 80
    }
    return [p for p in found if heldout(p) == (split == "heldout")]


def text(rng, stream, n: int, real: list[str]) -> list[dict]:
    """n documents of the world among paragraphs of English, each of which comes as often as any other (within one)."""
    docs = [world_text(rng, stream) for _ in range(n)]
    wanted, order = sum(map(len, docs)) * ENGLISH / (1 - ENGLISH), iter(())
    while wanted > 0:
        i = next(order, None)
        if i is None:
            order = iter(rng.permutation(len(real)))
            continue
        docs.append(real[i])
        wanted -= len(real[i])
    return [{"text": docs[i]} for i in rng.permutation(len(docs))]


def tokenizer_texts(seed: int) -> list[str]:
    """What to train this world's tokenizer on: its text, and every word often enough, with and without a space, to be
    one token."""
    marks = {mark for form in FORMS for mark in form.split() if not mark.isalpha() and mark != "{}"}
    words = sorted({*NAMES, *THINGS, *NUMBERS, *TASKS, *COURTESY, *marks, "and"})
    return [row["text"] for row in examples("text", "train", seed, 4000)] + [
        f"{w} {w}" for w in words
    ] * 1500


def conversations(rng, stream, n: int) -> list[dict]:
    """n conversations of one turn each, of mixed quality."""
    pairs = [(p, make_response(rng, p)[0]) for p in (next(stream) for _ in range(n))]
    return [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": r}]}
        for p, r in pairs
    ]


def comparisons(rng, stream, n: int, noisy: bool) -> list[dict]:
    """Pairs of responses of differing true score; noisy ones differ by anything and are sometimes flipped.

    The margin is the distance between the true scores, whichever way the label points.
    """
    rows = []
    while len(rows) < n:
        prompt = next(stream)
        a, form = make_response(rng, prompt)
        b, _ = make_response(rng, prompt, form if rng.random() < SAME_FORM else None)
        margin = true_score(prompt, a) - true_score(prompt, b)
        if margin == 0 or (not noisy and abs(margin) < CLEAN_DIFFERENCE):
            continue
        if (margin < 0) != (noisy and rng.random() < FLIPPED):
            a, b = b, a
        rows.append(
            {
                "prompt": [{"role": "user", "content": prompt}],
                "chosen": a,
                "rejected": b,
                "margin": abs(margin),
            }
        )
    return rows


def examples(spec: str, split: str, seed: int, limit: int = 0) -> list[dict]:
    """The examples of one data set and split ("train", "heldout"), the same for the same seed on any machine
    (of text, with the same version of Python).

    `spec` is a name, with options if wanted, "comparisons-clean:tasks=copy+find,examples=300": prompts of these tasks alone,
    so many examples at most. So does `limit`, of text the documents of the world; 0 is all.
    """
    name, _, given = spec.partition(":")
    if name not in SIZES:
        raise UserError(f"toy/{spec}: no such data set{nearest(name, list(SIZES))}")
    options = dict(option.partition("=")[::2] for option in given.split(",") if option)
    tasks = tuple(options.pop("tasks", "+".join(TASKS)).split("+"))
    most = options.pop("examples", "0")
    if options or not set(tasks) <= set(TASKS) or not most.isdecimal():
        raise UserError(
            f"toy/{spec}: options wanted of tasks={'+'.join(TASKS)} and examples=NUMBER"
        )
    rng = np.random.default_rng([seed, list(SIZES).index(name), split == "heldout"])
    n, stream = SIZES[name][split == "heldout"], prompts(rng, split, tasks)
    n = min(limit or n, int(most) or n, n)
    if name == "text":
        return text(rng, stream, n, english(split))
    if name == "conversations":
        return conversations(rng, stream, n)
    if name == "prompts":
        return [{"prompt": [{"role": "user", "content": next(stream)}]} for _ in range(n)]
    return comparisons(rng, stream, n, name == "comparisons-noisy")
