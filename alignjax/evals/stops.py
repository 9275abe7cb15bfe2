"""Compile stop strings to a transition table, which a device follows token by token.

It is the automaton of Aho and Corasick (1975) over characters. It detects a stop string that
begins in one token and ends in another, and one that lies within the text of a token.
"""

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase


def transition_table(
    stop_strings: list[str], token_texts: list[str]
) -> Int[np.ndarray, "states vocabulary"]:
    """Return the next state for each state and token, as int16.

    A state is a beginning of some stop string; state 0 is the empty one. The number of states,
    which is no row, is the final state: the response has met a stop string.
    """
    stop_strings = [string for string in stop_strings if string]
    states = prefixes_of(stop_strings)
    final = len(states)
    columns = {
        character: column for column, character in enumerate(sorted(set("".join(stop_strings))), 1)
    }
    steps = character_steps(states, columns, stop_strings)

    lengths = np.array([len(text) for text in token_texts])
    longest_first = np.argsort(-lengths, kind="stable")  # tokens not yet over are at the front
    table = np.repeat(np.arange(final, dtype=np.int16)[:, None], len(token_texts), axis=1)
    for place in range(lengths.max()):
        tokens = longest_first[: (lengths > place).sum()]
        character_columns = [columns.get(token_texts[token][place], 0) for token in tokens]
        table[:, tokens] = steps[table[:, tokens], character_columns]
    return table


def prefixes_of(stop_strings: list[str]) -> dict[str, int]:
    """Return the number of each proper beginning of a stop string; "" is number 0."""
    prefixes = {string[:length] for string in stop_strings for length in range(len(string))}
    return {prefix: number for number, prefix in enumerate(sorted(prefixes | {""}, key=len))}


def character_steps(
    states: dict[str, int], columns: dict[str, int], stop_strings: list[str]
) -> Int[np.ndarray, "states_and_final characters"]:
    """Return the next state for each state and character.

    Column 0 stands for any character that is in no stop string: it leads back to state 0. The
    final state leads to itself.
    """
    final = len(states)
    steps = np.zeros((final + 1, len(columns) + 1), np.int16)
    steps[final] = final
    for state, number in states.items():
        for character, column in columns.items():
            steps[number, column] = state_after(state + character, states, stop_strings)
    return steps


def state_after(text: str, states: dict[str, int], stop_strings: list[str]) -> int:
    """Return the state after a text: its longest end that is a beginning of a stop string.

    A text that ends with a whole stop string is in the final state.
    """
    if text.endswith(tuple(stop_strings)):
        return len(states)
    return next(states[text[start:]] for start in range(len(text) + 1) if text[start:] in states)


def texts_of_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """Return the text of each token after another token, including special tokens.

    An id that the tokenizer does not have gives "". A null character stands for a part of a
    character, so no stop string can match there.
    """
    first_token = tokenizer("x", add_special_tokens=False)["input_ids"][:1]
    known = range(min(len(tokenizer), vocab_size))
    texts = tokenizer.batch_decode(
        [[*first_token, token] for token in known], clean_up_tokenization_spaces=False
    )
    first_length = len(tokenizer.decode(first_token))
    known_texts = [text[first_length:].replace("\ufffd", "\0") for text in texts]
    return known_texts + [""] * (vocab_size - len(known))


def cut_at_stop(text: str, stop_strings: list[str]) -> str:
    """Return a text up to the first stop string in it."""
    starts = [text.index(string) for string in stop_strings if string and string in text]
    return text[: min(starts, default=len(text))]
