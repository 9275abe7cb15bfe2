"""Stop strings as a table for the device: the state behind each token, in each state.

The automaton of Aho and Corasick 1975, over characters. A string that begins in one token and ends in another is found, and
so is one that lies within the text of a token.
Letters: q states, v vocabulary.
"""

import numpy as np


def table(strings: list[str], ends: list[int], words: list[str]) -> np.ndarray:
    """[q v] int16, for words[v], the text of each token: a state is a beginning of some string, 0 is the empty one, and q,
    which is no row, says that the response is over: at a string, or at a token of `ends`."""
    strings = [string for string in strings if string]
    states = sorted({string[:i] for string in strings for i in range(len(string))} | {""}, key=len)
    number, q = {state: i for i, state in enumerate(states)}, len(states)
    letters = {letter: i + 1 for i, letter in enumerate(sorted(set("".join(strings))))}
    step = np.zeros(
        (q + 1, len(letters) + 1), np.int16
    )  # column 0 is any other character: back to the beginning
    step[q] = q
    for state, i in number.items():
        for letter, column in letters.items():
            step[i, column] = behind(state + letter, number, strings)
    lengths = np.array([len(word) for word in words])
    order = np.argsort(
        -lengths, kind="stable"
    )  # long words first: those that are left are in front
    out = np.repeat(np.arange(q, dtype=np.int16)[:, None], len(words), axis=1)
    for place in range(lengths.max()):
        longer = order[: (lengths > place).sum()]
        out[:, longer] = step[out[:, longer], [letters.get(words[i][place], 0) for i in longer]]
    out[:, ends] = q
    return out


def behind(text: str, number: dict[str, int], strings: list[str]) -> int:
    """The state of a text: the longest of its ends that begins a string, or the last if it ends with a whole one."""
    if text.endswith(tuple(strings)):
        return len(number)
    return next(number[text[i:]] for i in range(len(text) + 1) if text[i:] in number)


def words_of(tokenizer, vocab_size: int) -> list[str]:
    """The text of each token as it stands behind another, special tokens too; "" for ids that the tokenizer hasn't.

    Of a token that holds part of a character no stop string may be found in that part: a null stands for it.
    """
    first = tokenizer("x", add_special_tokens=False)["input_ids"][:1]
    known = range(min(len(tokenizer), vocab_size))
    texts = tokenizer.batch_decode([[*first, i] for i in known], clean_up_tokenization_spaces=False)
    skip = len(tokenizer.decode(first))
    return [text[skip:].replace("\ufffd", "\0") for text in texts] + [""] * (
        vocab_size - len(known)
    )


def cut(text: str, strings: list[str]) -> str:
    """A text up to the first of the strings in it."""
    return text[
        : min(
            (text.index(string) for string in strings if string and string in text),
            default=len(text),
        )
    ]
