"""The answer that a reply gives, as text: an option's letter, a number, or what BIG-Bench Hard asks for.

Replies come from chat models: they may explain first, use Markdown or LaTeX, repeat the option's text, or be empty.
Nothing found is "".
"""

import re
import string
from difflib import SequenceMatcher

# What may stand before a letter, and after it, few enough to be searched fast; X in the patterns below is the letter.
OPEN = r"(?:[\s*_`$\"'“‘(\[（【「]|\\(?:boxed|text|textbf|mathbf)\{|\\\(){0,8}"
CLOSE = r"[*_`$\"'”’)\]）】」}.:：,，]{0,8}"
ALONE, END = r"(?<![A-Za-z0-9'’])", r"(?![A-Za-z0-9'’])"

# In order: "answer/choice is X", "X is correct", a leading letter, the first letter that stands alone ("A dog" has none).
ENGLISH = (
    r"(?i:\b(?:answer|choice|option)s?(?: (?!not\b|[a-z]\b)\w+){0,3}?"
    + CLOSE
    + r"(?:\s*(?:is|would be|should be|must be)"
    r"\b|\s*=|(?<=[:：]))"
    + CLOSE
    + OPEN
    + r"(?:(?:therefore|most likely|option|choice|letter)\b[:：]?\s*)*)"
    + OPEN
    + "X"
    + END,
    ALONE + "X" + CLOSE + r"(?i:\s*(?:is|would be|seems|must be)\s+(?:the |most |a |likely )*"
    r"(?:correct|right|best|true|accurate|appropriate|answer)\b)",
    r"\A" + OPEN + r"X(?:\s*\Z|[*_`$\"'”’)\]）】」}.:：,，;、。\n])",
    ALONE + r"(?<!\bnot )(?![AI] (?!(?:is|because|since|as|and|would|seems)\b)[a-z])X" + END,
)
CHINESE = (
    r"(?:答案|选项|正确|合适|恰当|符合题意|错误)(?:的(?:选项|答案|一项|说法)?)?(?:应该|应当|应|就|可能)?(?:是|为|选|[:：])"
    + CLOSE
    + OPEN
    + r"(?:选项|选择|答案)?"
    + OPEN
    + "X"
    + END,
    r"(?<![不误勿])(?<!不[应能会该])(?:选择|选)(?:答案)?[:：]?" + OPEN + "X" + END,
    ALONE + "X" + CLOSE + r"\s*(?:选项|项|答案)?\s*(?:的(?:说法|描述|表述))?(?:是|为)?(?:完全|最)?"
    r"(?:正确|对的|符合题意|恰当|最佳|合适)",
)
DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
NUMBER = re.compile(rf"(?<![\w.])[-−]?\$?(?:{DIGITS}|\.\d+)|(?<=[A-Za-z*=×+/_^-]){DIGITS}")


def choice(reply: str, options: list[str], chinese: bool = False) -> str:
    """The letter, A for the first of `options`, that the reply chooses.

    Where an option's text stands it is read as its letter. Then the patterns above are tried in order, the Chinese ones
    first if they are wanted; at last comes the option whose text is most like the reply. Only an empty reply chooses none.
    """
    reply = reply.strip()
    if not reply:
        return ""
    letters = string.ascii_uppercase[: len(options)]
    text = lettered(reply, options)
    for pattern in (*(CHINESE if chinese else ()), *ENGLISH):
        found = re.search(pattern.replace("X", f"([{letters}])"), text)
        if found:
            return found[1]
    alike = [SequenceMatcher(None, reply.lower(), option.lower()).ratio() for option in options]
    return letters[alike.index(max(alike))]


def lettered(reply: str, options: list[str]) -> str:
    """The reply with its options' letters in place of their texts, the longest first, where they stand as whole words.

    An option that is itself a letter (a blood group) is left: the reply's letter is then more likely the option's name.
    """
    letters = {
        o.strip().rstrip(".。").lower(): x
        for o, x in zip(options, string.ascii_uppercase, strict=False)
    }
    known = sorted(
        (t for t in letters if t and not re.fullmatch("[a-z]", t)), key=len, reverse=True
    )
    if not known:
        return reply
    pattern = r"(?<![A-Za-z0-9])(?:" + "|".join(map(re.escape, known)) + r")(?![A-Za-z0-9])"
    return re.sub(pattern, lambda m: letters[m[0].lower()], reply, flags=re.IGNORECASE)


def numbers(text: str) -> list[str]:
    """All numbers, without currency signs and thousands' commas; a minus after a digit is a subtraction."""
    return [re.sub(r"[$,]", "", n).replace("−", "-") for n in NUMBER.findall(text)]


def last_number(reply: str) -> str:
    return next(reversed(numbers(reply)), "")


def same_number(a: str, b: str) -> bool:
    """Whether two numbers are equal within 1e-4; "" is none."""
    return bool(a and b) and abs(float(a) - float(b)) < 1e-4


def statement(reply: str) -> str:
    """What follows the last "answer is" or "answer:", to the line's end, or the next line if that is empty; else ""."""
    found = list(re.finditer(r"(?i)\banswer\W{0,4}(?:is\b(?! not\b)|[:：=])[:：]?", reply))
    rest = reply[found[-1].end() :].strip("*_ \n") if found else ""
    return rest.partition("\n")[0].strip()


def option(reply: str, question: str) -> str:
    """ "(B)", for a question that lists its options as "(B) text": what is stated, else the last such letter."""
    options = re.findall(r"^\(([A-Z])\) *(.*)$", question, re.MULTILINE)
    texts = [text for letter, text in options]
    stated, named = statement(reply), re.findall(r"\(([A-Z])\)", reply)
    letter = choice(stated or reply, texts) if stated or not named else named[-1]
    return f"({letter})" if letter else ""


def word(reply: str, words: tuple[str, ...]) -> str:
    """The first of `words` that is stated, else the last in the reply; as it is spelled in `words`."""
    spelled = {w.lower(): w for w in words}
    pattern = rf"(?i)\b(?:{'|'.join(words)})\b"
    stated = re.findall(pattern, statement(reply))
    anywhere = re.findall(pattern, reply)
    return spelled[(stated[:1] or anywhere[-1:])[0].lower()] if anywhere else ""


def stated_number(reply: str) -> str:
    """The first number of the statement, after its last "=" if there is one; else the reply's last."""
    stated = numbers(statement(reply).rpartition("=")[2])
    return stated[0] if stated else last_number(reply)


def brackets(reply: str) -> str:
    """The brackets of the statement, else of the last line, with spaces between them."""
    lines = reply.strip().splitlines() or [""]
    return " ".join(re.findall(r"[()\[\]{}<>]", statement(reply) or lines[-1]))


def words(reply: str) -> str:
    """The words of the statement (one line, or a list of items below it), else of the last line, with spaces between."""
    stated, lines = statement(reply), reply.strip().splitlines() or [""]
    if re.match(r"(?:\d+[.)]|[-*•]) ", stated):  # a list
        stated = " ".join(
            re.findall(r"(?m)^\s*(?:\d+[.)]|[-*•]) +(.+)$", reply[reply.rindex(stated) :])
        )
    said = (w.strip(".,;:!?\"'“”‘’`*()[]") for w in re.split(r"[\s,<>]+", stated or lines[-1]))
    return " ".join(w for w in said if w and not w.isdigit())
