"""Extraction from replies as models write them: answers in English and Chinese, and programs."""

import subprocess
import sys
import time

import pytest

from alignjax.config import UserError
from alignjax.evals import answers, programs

CITIES = ["Lyon", "Paris", "Rome", "Both Lyon and Rome"]
SOUNDS = ["The dog barked.", "A cat", "One", "1"]


@pytest.mark.parametrize(
    "letter, reply, options",
    [
        ("B", "B", CITIES),
        ("B", " B.", CITIES),
        ("B", "(B)", CITIES),
        ("B", "B) Paris", CITIES),
        ("B", "**B. Paris**", CITIES),
        ("B", "B\n\nParis has been the capital since 987.", CITIES),
        ("B", "The answer is B.", CITIES),
        ("B", "The correct answer is (B) Paris.", CITIES),
        ("B", "Answer: B", CITIES),
        ("B", "**Answer:** B", CITIES),
        ("B", "**Answer: (B)**", CITIES),
        ("B", "The answer to this question is option B, since Lyon is no capital.", CITIES),
        ("B", "The best choice would be **B**.", CITIES),
        ("B", r"The answer is $\boxed{B}$.", CITIES),
        ("B", r"The final answer is \(\boxed{\text{B}}\)", CITIES),
        ("B", "The answer is therefore B", CITIES),
        (
            "B",
            "Option A is wrong. Option C is wrong as well. Thus the correct answer is option B.",
            CITIES,
        ),
        ("B", "Lyon and Rome won't do: B is correct.", CITIES),
        ("B", "I believe (B) is the most appropriate one.", CITIES),
        ("B", "The answer is Paris.", CITIES),
        ("B", "The capital of France is Paris.", CITIES),
        ("B", "paris", CITIES),
        ("B", "It must be Pariss, I think", CITIES),
        ("D", "The answer is both Lyon and Rome.", CITIES),
        ("D", "Both Lyon and Rome", CITIES),
        ("A", "A is the capital", CITIES),
        ("A", "I would choose A because of its history.", CITIES),
        ("C", "The answer is not A, it is C", CITIES),
        ("C", "A dog? No: C", ["w", "x", "y", "z"]),
        ("B", "A dog was heard, so B", SOUNDS),
        ("A", "the dog barked", SOUNDS),
        ("D", "In 10 of 11 cases it is 1", SOUNDS),
        ("A", "The answer is A", ["B", "A", "AB", "O"]),
        ("C", "AB", ["B", "A", "AB", "O"]),
        ("", "", CITIES),
        ("", " \n", CITIES),
        ("F", "The answer is (F).", list("uvwxyz")),
    ],
)
def test_chosen_letter(letter, reply, options):
    assert answers.chosen_letter(reply, options) == letter


PLACES = ["上海", "北京", "广州", "以上都不对"]


@pytest.mark.parametrize(
    "letter, reply",
    [
        ("B", "B"),
        ("B", "B。"),
        ("B", "答案是B。"),
        ("B", "答案：B"),
        ("B", "正确答案为：B. 北京"),
        ("B", "**正确答案是：B**"),
        ("B", "正确的选项是 B。"),
        ("B", "答案应该是（B）北京"),
        ("B", "因此，答案选B"),
        ("B", "故选B。"),
        ("B", "A选项错误，C选项错误，所以应选择B选项。"),
        ("B", "不选A，选B"),
        ("B", "我不会选A，我选 B。"),
        ("B", "A项不正确；B项正确。"),
        ("B", "B是正确的，因为首都在那里。"),
        ("B", "选项B的说法是正确的"),
        ("B", "中国的首都是北京。"),
        ("D", "以上都不对"),
        ("C", "说法错误的是C"),
        ("C", "A正确，B正确，D正确，故选C"),
        ("B", "The correct answer is B."),
        ("", ""),
    ],
)
def test_chosen_letter_in_chinese(letter, reply):
    assert answers.chosen_letter(reply, PLACES, chinese=True) == letter


@pytest.mark.parametrize(
    "piece", ["*", " ", "answer is ", "答案是", "(", "A ", "not A, ", "1,", "```\n", "\\boxed{"]
)
def test_a_model_that_repeats_itself_takes_no_time(piece):
    reply = f"The answer is {piece * 4000}"
    start = time.monotonic()
    answers.chosen_letter(reply, PLACES, chinese=True)
    answers.last_number(reply)
    answers.stated_number(reply)
    answers.stated_brackets(reply)
    answers.stated_words(reply)
    answers.chosen_option(reply, DATES)
    programs.solution(PROMPT, "total", reply[:4000])
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "number, reply",
    [
        ("18", "She makes 9 * 2 = $18 every day."),
        ("18", "The answer is 18."),
        ("18.50", "It costs **$18.50**."),
        ("1234567", "So there are 1,234,567 of them"),
        ("1000", "#### 1,000"),
        ("-3", "The temperature is -3 degrees."),
        ("-3", "The temperature is −3 degrees."),
        ("5", "8-5"),
        ("13", "16-3=13"),
        ("18", r"\boxed{18}"),
        ("4", "3/4"),
        (".5", "a half, .5"),
        ("18", "18, that is all"),
        ("20", "20%"),
        ("3", "one of 1,2,3"),
        ("", "I don't know."),
        ("", ""),
    ],
)
def test_last_number(number, reply):
    assert answers.last_number(reply) == number


def test_numbers_are_the_same_within_a_ten_thousandth():
    assert answers.same_number("18", "18.00")
    assert answers.same_number("0.33333", ".3333")
    assert not answers.same_number("18", "18.001")
    assert not answers.same_number("", "18")


DATES = "What is the date?\nOptions:\n(A) 12/11/1937\n(B) 12/25/1937\n(C) 01/04/1938"


@pytest.mark.parametrize(
    "letter, reply",
    [
        ("(B)", "Christmas Eve is the 24th. So the answer is (B)."),
        ("(B)", "(A) is too early and (C) too late.\n\nThe answer is **(B)**."),
        ("(B)", "The answer is B"),
        ("(B)", "**The answer is:** 12/25/1937."),
        ("(B)", "If the answer is (A), it is the 11th. But no: the answer is (B)"),
        ("(B)", "I compare (A), (C) and choose (B)"),
        ("(B)", "12/25/1937"),
        ("(B)", "The answer is (B). That the answer is not (A) is clear."),
        ("", ""),
    ],
)
def test_chosen_option(letter, reply):
    assert answers.chosen_option(reply, DATES) == letter


@pytest.mark.parametrize(
    "right, reply, words",
    [
        ("True", "not False = True. So the answer is True.", ("True", "False")),
        ("False", "True and False is\n\nThe answer is: **False**", ("True", "False")),
        ("Yes", "We are back. The answer is yes, not no", ("Yes", "No")),
        ("no", "Is it plausible? No", ("yes", "no")),
        ("invalid", "The argument is therefore invalid.", ("valid", "invalid")),
        ("", "Perhaps", ("valid", "invalid")),
    ],
)
def test_chosen_word(right, reply, words):
    assert answers.chosen_word(reply, words) == right


@pytest.mark.parametrize(
    "number, reply",
    [
        ("7", "3 + 4 = 7. So the answer is 3 + 4 = 7. I am 100 % sure."),
        ("8", "The answer is 8 of 12"),
        ("4", "I count 2, 3, 4"),
    ],
)
def test_stated_number(number, reply):
    assert answers.stated_number(reply) == number


@pytest.mark.parametrize(
    "brackets, reply",
    [
        ("> ]", "The stack is [ <. So the answer is > ]."),
        ("> ]", "The answer is:\n`>]`"),
        ("] )", "first\n] )"),
    ],
)
def test_stated_brackets(brackets, reply):
    assert answers.stated_brackets(reply) == brackets


@pytest.mark.parametrize(
    "words, reply",
    [
        ("apple bear o'clock", "Sorted. The answer is apple bear o'clock."),
        ("apple bear cat", "The answer is: **apple, bear, cat**"),
        ("apple bear cat", "The answer is:\n\n1. apple\n2. bear\n3. cat\n\nDone."),
        ("apple bear cat", "apple < bear < cat"),
        ("", ""),
    ],
)
def test_stated_words(words, reply):
    assert answers.stated_words(reply) == words


PROMPT = (
    "from typing import List\n\n\ndef inc(x):\n    return x + 1\n\n\n"
    "def total(xs: List[int], start: int = 0) -> int:\n"
    '    """ The sum of xs, and start.\n    >>> total([1, 2])\n    3\n    """\n'
)
BODY = "    for x in xs:\n        start += x\n    return start\n"
WHOLE = "def total(xs: List[int], start: int = 0) -> int:\n" + BODY
TEST = """def check(candidate):
    assert candidate([1, 2]) == 3
    assert candidate([], 4) == inc(3)
"""


@pytest.mark.parametrize(
    "reply",
    [
        BODY,
        BODY.strip(),  # the first line has lost its indent
        "for x in xs:\n    start += x\nreturn start",
        "for x in xs:\n        start += x\n    return start",
        "return sum(xs, start)",
        BODY + "\nThis adds all of them up, doesn't it?",
        f"```python\n{BODY}```",
        WHOLE,
        f"Sure! Here it is:\n\n{WHOLE}\n\nIt works as follows: it's a loop.",
        f"Here is the function:\n```python\n{WHOLE}```\nIt runs in O(n).",
        f"```py\n{WHOLE}",  # cut off before the fence
        f"```\nimport math\nfrom typing import List\n\n\n{WHOLE}\n```",
        f"First\n```bash\npip install numpy\n```\nthen\n```python\n{WHOLE}```\n"
        "and try it:\n```python\nprint(total([1]) / 0)\n```",
        "1. So:\n   ```python\n   def total(xs, start=0):\n       return sum(xs, start)\n   ```",
        "```python\ndef helper(xs):\n    return sum(xs)\n\n\n"
        "def total(xs, start=0):\n    return helper(xs) + start\n```",
        f"```python\n{WHOLE}\nas you can see\n```",
        PROMPT + BODY,
    ],
)
def test_programs_that_work(reply):
    process = run_solution(reply)
    assert process.returncode == 0, f"{process.args[-1]}\n{process.stderr}"


def run_solution(reply) -> subprocess.CompletedProcess:
    """Run the program of a reply in an interpreter without installed packages."""
    code = programs.solution(PROMPT, "total", reply)
    tests = programs.tests_of(PROMPT, TEST, "total")
    program = f"{code}\nprogram_function = globals().get\n{tests}"
    command = [sys.executable, "-S", "-E", "-c", program]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "reply, error",
    [
        ("    return 0", "AssertionError"),
        ("", "AssertionError"),
        # The function is then what the prompt has: a docstring.
        ("I'm sorry, I can't.", "AssertionError"),
        ("def total(xs):\n    return sum(xs", "SyntaxError"),
        # A function of another name does not count.
        ("```python\ndef add(xs, start=0):\n    return sum(xs, start)\n```", "AssertionError"),
        ("def total(xs, start=0):\n    return numpy.sum(xs)", "NameError"),
    ],
)
def test_programs_that_fail(reply, error):
    process = run_solution(reply)
    assert process.returncode == 1
    assert error in process.stderr


def test_signature_of_the_prompts_function():
    function = programs.find_function(PROMPT, "total")
    assert programs.signature(function) == "total(xs: List[int], start: int=0) -> int"
    with pytest.raises(UserError, match="expected a function 'sum'"):
        programs.find_function(PROMPT, "sum")
    with pytest.raises(UserError, match="expected Python"):
        programs.find_function("def total(", "total")
