"""Extract the answer that a reply gives: an option's letter, a number, or what BBH asks for.

Replies come from chat models: they may explain first, use Markdown or LaTeX, repeat the option's
text, or be empty. All functions return "" if there is no answer.
"""

import re
import string
from difflib import SequenceMatcher

# What may stand before and after a letter. The number of characters is bounded, so a search stays
# fast. In the patterns below, X stands for the letter.
OPENING = r"(?:[\s*_`$\"'“‘(\[（【「]|\\(?:boxed|text|textbf|mathbf)\{|\\\(){0,8}"
CLOSING = r"[*_`$\"'”’)\]）】」}.:：,，]{0,8}"
WORD_START = r"(?<![A-Za-z0-9'’])"
WORD_END = r"(?![A-Za-z0-9'’])"

# "The answer is X", "the best choice would be X", "Answer: X"
ENGLISH_STATEMENT = (
    r"(?i:\b(?:answer|choice|option)s?(?: (?!not\b|[a-z]\b)\w+){0,3}?"
    + CLOSING
    + r"(?:\s*(?:is|would be|should be|must be)\b|\s*=|(?<=[:：]))"
    + CLOSING
    + OPENING
    + r"(?:(?:therefore|most likely|option|choice|letter)\b[:：]?\s*)*)"
    + OPENING
    + "X"
    + WORD_END
)
# "X is correct", "X seems the most likely answer"
ENGLISH_VERDICT = (
    WORD_START
    + "X"
    + CLOSING
    + r"(?i:\s*(?:is|would be|seems|must be)\s+(?:the |most |a |likely )*"
    + r"(?:correct|right|best|true|accurate|appropriate|answer)\b)"
)
# The reply begins with the letter.
LEADING_LETTER = r"\A" + OPENING + r"X(?:\s*\Z|[*_`$\"'”’)\]）】」}.:：,，;、。\n])"
# The first letter that stands alone; in "A dog" there is none.
LONE_LETTER = (
    WORD_START
    + r"(?<!\bnot )(?![AI] (?!(?:is|because|since|as|and|would|seems)\b)[a-z])X"
    + WORD_END
)
ENGLISH_PATTERNS = (ENGLISH_STATEMENT, ENGLISH_VERDICT, LEADING_LETTER, LONE_LETTER)

# "The answer is X", "the correct option is X"
CHINESE_STATEMENT = (
    r"(?:答案|选项|正确|合适|恰当|符合题意|错误)"
    + r"(?:的(?:选项|答案|一项|说法)?)?(?:应该|应当|应|就|可能)?(?:是|为|选|[:：])"
    + CLOSING
    + OPENING
    + r"(?:选项|选择|答案)?"
    + OPENING
    + "X"
    + WORD_END
)
# "Choose X", but not "do not choose X"
CHINESE_CHOICE = (
    r"(?<![不误勿])(?<!不[应能会该])(?:选择|选)(?:答案)?[:：]?" + OPENING + "X" + WORD_END
)
# "X is correct"
CHINESE_VERDICT = (
    WORD_START
    + "X"
    + CLOSING
    + r"\s*(?:选项|项|答案)?\s*(?:的(?:说法|描述|表述))?(?:是|为)?(?:完全|最)?"
    + r"(?:正确|对的|符合题意|恰当|最佳|合适)"
)
CHINESE_PATTERNS = (CHINESE_STATEMENT, CHINESE_CHOICE, CHINESE_VERDICT)

# "The answer is", "answer:", but not "the answer is not"
ANSWER_PHRASE = re.compile(r"(?i)\banswer\W{0,4}(?:is\b(?! not\b)|[:：=])[:：]?")
LIST_MARK = re.compile(r"(?:\d+[.)]|[-*•]) ")
LIST_ITEM = re.compile(r"(?m)^\s*(?:\d+[.)]|[-*•]) +(.+)$")

DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
NUMBER = re.compile(rf"(?<![\w.])[-−]?\$?(?:{DIGITS}|\.\d+)|(?<=[A-Za-z*=×+/_^-]){DIGITS}")


def chosen_letter(reply: str, options: list[str], chinese: bool = False) -> str:
    """Return the letter that the reply chooses; A is the first of `options`.

    An option's text counts as its letter. Then the patterns above are tried in order; with
    `chinese`, the Chinese ones come first. If none matches, the option whose text is most similar
    to the reply is chosen, so only an empty reply chooses none.
    """
    reply = reply.strip()
    if not reply:
        return ""
    letters = string.ascii_uppercase[: len(options)]
    text = replace_options_by_letters(reply, options)
    patterns = (*CHINESE_PATTERNS, *ENGLISH_PATTERNS) if chinese else ENGLISH_PATTERNS
    for pattern in patterns:
        match = re.search(pattern.replace("X", f"([{letters}])"), text)
        if match:
            return match[1]
    similarities = [similarity(reply, option) for option in options]
    return letters[similarities.index(max(similarities))]


def similarity(reply: str, option: str) -> float:
    """Return how similar two texts are, from 0 to 1, ignoring case."""
    return SequenceMatcher(None, reply.lower(), option.lower()).ratio()


def replace_options_by_letters(reply: str, options: list[str]) -> str:
    """Replace each option's text by its letter where it stands as whole words, longest first.

    An option that is itself a letter (a blood group) stays, because a letter in the reply is then
    more likely to be an option's name.
    """
    letters = {}
    for option, letter in zip(options, string.ascii_uppercase, strict=False):
        letters[option.strip().rstrip(".。").lower()] = letter
    texts = [text for text in letters if text and not re.fullmatch("[a-z]", text)]
    if not texts:
        return reply
    alternatives = "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    pattern = r"(?<![A-Za-z0-9])(?:" + alternatives + r")(?![A-Za-z0-9])"
    return re.sub(pattern, lambda match: letters[match[0].lower()], reply, flags=re.IGNORECASE)


def numbers(text: str) -> list[str]:
    """Return all numbers of a text, without currency signs and thousands separators.

    A minus sign after a digit is a subtraction and belongs to no number.
    """
    return [re.sub(r"[$,]", "", number).replace("−", "-") for number in NUMBER.findall(text)]


def last_number(reply: str) -> str:
    """Return the last number of a reply."""
    return next(reversed(numbers(reply)), "")


def same_number(first: str, second: str) -> bool:
    """Return whether two numbers are equal within 1e-4; "" equals nothing."""
    return bool(first and second) and abs(float(first) - float(second)) < 1e-4


def stated_answer(reply: str) -> str:
    """Return what follows the last "answer is" or "answer:" up to the end of its line.

    If the rest of the line is empty, return the next line.
    """
    phrases = list(ANSWER_PHRASE.finditer(reply))
    if not phrases:
        return ""
    rest = reply[phrases[-1].end() :].strip("*_ \n")
    return rest.partition("\n")[0].strip()


def last_line(reply: str) -> str:
    """Return the last line of a reply that is not blank."""
    lines = reply.strip().splitlines() or [""]
    return lines[-1]


def chosen_option(reply: str, question: str) -> str:
    """Return an option such as "(B)", for a question that lists its options as "(B) text".

    The stated option counts, or else the last letter in parentheses.
    """
    options = re.findall(r"^\([A-Z]\) *(.*)$", question, re.MULTILINE)
    stated = stated_answer(reply)
    letters_in_parentheses = re.findall(r"\(([A-Z])\)", reply)
    if stated or not letters_in_parentheses:
        letter = chosen_letter(stated or reply, options)
    else:
        letter = letters_in_parentheses[-1]
    return f"({letter})" if letter else ""


def chosen_word(reply: str, words: tuple[str, ...]) -> str:
    """Return the first of `words` that is stated, or else the last in the reply.

    It is spelled as in `words`.
    """
    spellings = {word.lower(): word for word in words}
    pattern = rf"(?i)\b(?:{'|'.join(words)})\b"
    stated = re.findall(pattern, stated_answer(reply))
    anywhere = re.findall(pattern, reply)
    if not anywhere:
        return ""
    chosen = stated[0] if stated else anywhere[-1]
    return spellings[chosen.lower()]


def stated_number(reply: str) -> str:
    """Return the first number stated, after the last "=" in the statement if it has one.

    If no number is stated, return the reply's last number.
    """
    stated = numbers(stated_answer(reply).rpartition("=")[2])
    return stated[0] if stated else last_number(reply)


def stated_brackets(reply: str) -> str:
    """Return the brackets stated, or else those of the last line, separated by spaces."""
    return " ".join(re.findall(r"[()\[\]{}<>]", stated_answer(reply) or last_line(reply)))


def stated_words(reply: str) -> str:
    """Return the words stated, or else those of the last line, separated by spaces.

    The statement may be one line, or a list of items that begins on it.
    """
    stated = stated_answer(reply)
    if LIST_MARK.match(stated):
        stated = " ".join(LIST_ITEM.findall(reply[reply.rindex(stated) :]))
    parts = re.split(r"[\s,<>]+", stated or last_line(reply))
    words = [part.strip(".,;:!?\"'“”‘’`*()[]") for part in parts]
    return " ".join(word for word in words if word and not word.isdigit())
