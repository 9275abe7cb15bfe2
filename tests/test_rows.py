"""What files of users may look like: the forms that are read, and how others are refused."""

import collections
import decimal
import functools
import gzip
import json
import os
import random
import socket
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from alignjax import config as configs
from alignjax.config import UserError
from alignjax.data import files, json_array, mixture, paths, raw_rows, sources
from alignjax.data.preferences import rows as published

# The names of cases must be the same in every process: without this, gzip writes the time.
compress = functools.partial(gzip.compress, mtime=0)
BOM = b"\xef\xbb\xbf"
LONE = "\ud83d"  # half of a surrogate pair
USER = {"role": "user", "content": "q"}
REPLY = {"role": "assistant", "content": "a"}
PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.fixture(autouse=True)
def directory(tmp_path, monkeypatch):
    """Work in an empty directory, so messages begin with short names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(source, kind="text", **options):
    """Return the examples of a source without their places."""
    read_options = sources.ReadOptions(say=lambda line: None, **options)
    examples = sources.load(source, kind, "train", read_options)
    return [{name: value for name, value in row.items() if name != "where"} for row in examples]


def write(name, content):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def line(row):
    """Return a row as JSON; ensure_ascii writes half of a surrogate pair as an escape."""
    return json.dumps(row)


def conversation(*messages):
    return {"messages": list(messages)}


def refusal(source, kind="text", **options):
    """Return the one line that refuses a source."""
    with pytest.raises(UserError) as caught:
        load(source, kind, **options)
    message = str(caught.value)
    assert "\n" not in message and message.isprintable()
    message.encode()
    return message


# -------------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize(
    "name, content",
    [
        ("bom.jsonl", BOM + b'{"text": "a"}\n{"text": "b"}\n'),
        ("joined.jsonl", BOM + b'{"text": "a"}\n' + BOM + b'{"text": "b"}\n'),
        ("windows.jsonl", b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n'),
        ("bom.jsonl.gz", compress(BOM + b'{"text": "a"}\n{"text": "b"}')),
        ("no_suffix", compress(b'{"text": "a"}\n{"text": "b"}')),
        ("members.gz", compress(b'{"text": "a"}\n') + compress(b'{"text": "b"}')),
        ("array.json", b'[{"text": "a"},\n {"text": "b"}]\n'),
        ("array.jsonl", b' \n[{"text": "a"}, {"text": "b"}]'),
        ("bom.json", BOM + b'\n[{"text": "a"}, {"text": "b"}]'),
        ("array.json.gz", compress(BOM + b'[{"text": "a"}, {"text": "b"}]')),
    ],
)
def test_a_file_is_read_whatever_its_form(name, content):
    assert load(write(name, content)) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("characters", [1, 2, 7, 64, 1 << 20])
def test_an_array_is_the_same_whatever_is_read_at_a_time(characters, monkeypatch):
    monkeypatch.setattr(json_array, "CHARACTERS", characters)
    rows = [
        {"text": 'quotes " and \\ é 猫 😀', "n": [1.5e-7, -12, True, None, {}]},
        {"text": "x" * 50, "deep": {"a": [[{"b": "]"}]]}},
        {"text": "", "n": 123456789},
    ]
    for options in ({}, {"indent": 1}, {"ensure_ascii": False}):
        write("rows.json", json.dumps(rows, **options))
        values = [item.value for item in json_array.values("rows.json")]
        assert values == rows
    write("numbers.json", "[12, 3.5 , null,true,\n[]]")
    assert [item.value for item in json_array.values("numbers.json")] == [12, 3.5, None, True, []]
    write("bad.json", '[{"text": "a"},\n\n{"text" "b"}, {"text": "c"}]')
    with pytest.raises(UserError, match="bad.json: row 2: line 3: not JSON: Expecting ':'"):
        list(json_array.values("bad.json"))


def test_only_a_part_of_a_long_array_is_in_memory(monkeypatch):
    monkeypatch.setattr(json_array, "CHARACTERS", 100)
    write("rows.json", json.dumps([{"text": "word " * (1 + i % 9)} for i in range(500)]))
    with open("rows.json", encoding="utf-8") as stream:
        reader = json_array.Reader(stream, "rows.json")
        longest = max(len(reader.text) for _ in reader.values())
    assert longest < 400


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b"[]", "a.json: empty, there are no text in it"),
        ("a.json", b"[", "row 1: line 1: not JSON"),
        ("a.json", b'[{"text": "a"}', "row 1: line 1: the array does not end"),
        ("a.json", b'[{"text": "a"}, {"te', "row 2: line 1: not JSON: Unterminated string"),
        ("a.json", b'[{"text": "a"},]', "row 2: line 1: not JSON"),
        ("a.json", b'[{"text": "a"}\n{"text": "b"}]', "row 1: line 2: not JSON: expected , or ]"),
        ("a.json", b'[{"text": "a"}]\n[]', "line 2: there is more behind the end of the array"),
        ("a.json", b'[{"text": "a"}, "b"]', "a.json: row 2: expected an object, found str"),
        ("a.json", b"[" * 100000, "row 1: line 1: objects or lists are nested too deeply"),
        ("a.json", b'[{"text": "\xff"}]', "row 1: expected a JSON array in UTF-8"),
        ("a.json", b'[{"text": "a", "text": "b"}]', "row 1: the field 'text' is there twice"),
        ("a.json", b'[{"n": ' + b"9" * 5000 + b"}]", "row 1: a whole number has too many digits"),
        ("a.jsonl", b"", "a.jsonl: empty"),
        ("a.jsonl", BOM, "a.jsonl: empty"),
        ("a.jsonl", b"\0" * 9, "a.jsonl:1: not JSON: .*; expected JSON lines, a JSON array"),
        ("a.jsonl", b'{\n"text": "a"\n}', "a.jsonl:1: not JSON: .*; expected JSON lines"),
        ("a.jsonl", b'{"text": "a"}\r{"text": "b"}', "a.jsonl:1: not JSON: Extra data"),
        ("a.jsonl", b'\xff\xfe{\0"\0', "a.jsonl: expected JSON lines.*, found text in UTF-16"),
        ("a.jsonl.gz", b"", "a.jsonl.gz: empty"),
        ("a.jsonl.gz", compress(b'{"text": "a"}')[:-9], "a.jsonl.gz:1: .*file ended before"),
        ("a.gz", compress(b'{"text": "a"}\n') + b"junk", "a.gz:2: .*Not a gzipped file"),
        ("a.json.gz", compress(b'[{"text": "a"}]')[:-9], "a.json.gz.*file ended before"),
        ("a.zst", b"\x28\xb5\x2f\xfd", "found a file compressed with zstd"),
        ("a.xlsx", b"PK\x03\x04", "found a zip archive or spreadsheet"),
        ("a.arrow", b"ARROW1", "found an Arrow or Feather file"),
        ("a.jsonl", b"version https://git-lfs", "found a pointer of Git LFS, not the file itself"),
        ("a.csv", b"text\na\n", "found a file that ends in .csv"),
        ("a.parquet", b"", "a.parquet: expected Parquet"),
        ("a", b"PAR1" + b"\0" * 40 + b"PAR1", "a: expected Parquet"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused_in_one_line(name, content, message):
    with pytest.raises(UserError, match=message):
        load(write(name, content))
    assert "\n" not in refusal(name)


def test_what_is_no_file_is_refused_without_opening_it(directory):
    os.mkfifo("pipe")
    os.mkfifo("pipe.parquet")
    os.mkdir("folder.jsonl")
    os.symlink("loop", "loop")
    os.symlink("nothing", "broken.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    for name in ("pipe", "pipe.parquet", "socket", "/dev/null", "/dev/zero", "/dev/stdin"):
        assert f"{name}: expected a regular file" in refusal(name)
    assert "folder.jsonl: a directory; name the files in it" in refusal("folder.jsonl")
    assert "a directory" in refusal("fold*")
    assert "loop: cannot be read: Too many levels" in refusal("loop")
    assert "broken.jsonl: cannot be read: No such file" in refusal("broken.jsonl")


# --------------------------------------------------------------------------------- names of sources


@pytest.mark.parametrize(
    "name",
    ["a,b.jsonl", "x[1].jsonl", "*.jsonl", "0.5*w.jsonl", " a b .jsonl", "toy[x]/y,?.jsonl"],
)
def test_an_existing_file_is_read_whatever_its_name(name):
    Path(name).parent.mkdir(exist_ok=True)
    write(name, '{"text": "a"}')
    write("plain.jsonl", '{"text": "b"}')
    assert sources.parse(name) == [(name, None)]
    assert sources.parse(f"plain.jsonl,{name}") == [("plain.jsonl", None), (name, None)]
    assert sources.parse(f".5*{name},.5*plain.jsonl") == [(name, 0.5), ("plain.jsonl", 0.5)]
    assert load(name) == [{"text": "a"}]


def test_a_directory_before_a_pattern_is_taken_as_it_is():
    Path("runs[1]").mkdir()
    write("runs[1]/a.jsonl", '{"text": "a"}')
    write("runs[1]/b.jsonl", '{"text": "b"}')
    assert load("runs[1]/*.jsonl") == [{"text": "a"}, {"text": "b"}]
    assert paths.exists("runs[1]/?.jsonl") and not paths.exists("runs[2]/?.jsonl")


@pytest.mark.parametrize(
    "name, message",
    [
        ("plian.jsonl", "plian.jsonl: no such file; did you mean 'plain.jsonl'"),
        ("absent/a.jsonl", "there is no directory absent"),
        ("x[1].jsonl", "make it a pattern, which matches nothing"),
        ("~/a.jsonl", "a shell replaces ~"),
        ("gs://bucket/a.jsonl", "must be local"),
        ("hf://datasets/org/name", "must be local"),
        ("a\0b", "without control characters"),
        ("a\nb", "without control characters"),
        ("\udcff.jsonl", "in UTF-8"),
        ("a" * 5000, "no such file"),
        ("plain.jsonl/a", "no such file"),
        (".", "a directory"),
        ("toy/", "no such data set"),
        ("tfds/", "there is no set"),
    ],
)
def test_a_name_without_a_file_says_what_is_wanted(name, message):
    write("plain.jsonl", '{"text": "b"}')
    assert message in refusal(name)


def test_options_of_a_set_are_its_own_and_nobody_elses():
    assert sources.parse("tfds/shp:a=1,b=2,x.jsonl") == [
        ("tfds/shp:a=1,b=2", None),
        ("x.jsonl", None),
    ]
    assert sources.parse("shp:a=1,b=2,summarize") == [("shp:a=1,b=2", None), ("summarize", None)]
    assert sources.parse("toy/comparisons-clean:tasks=copy,examples=3,toy/text") == [
        ("toy/comparisons-clean:tasks=copy,examples=3", None),
        ("toy/text", None),
    ]
    assert sources.parse("x.jsonl,b=2.jsonl") == [("x.jsonl", None), ("b=2.jsonl", None)]
    for text in (",", ",,", " ", "a,,b", "0*x", "9" * 400 + "*x", "2*a,b"):
        with pytest.raises(UserError, match="data.train='"):
            sources.parse(text, "data.train")


# -------------------------------------------------------------------------------------- single rows


@pytest.mark.parametrize(
    "row, messages",
    [
        (
            conversation(USER, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}),
            [USER, REPLY],
        ),
        (
            conversation(
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}],
                },
                REPLY,
            ),
            [{"role": "user", "content": "xy"}, REPLY],
        ),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, None),
        (conversation({"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}), None),
        ({"conversations": [USER, REPLY], "system": ""}, None),
        (
            {"conversations": [{"from": "human", "value": "q"}, REPLY], "system": "be kind"},
            [{"role": "system", "content": "be kind"}, USER, REPLY],
        ),
        ({"prompt": "q", "completion": "a"}, None),
        ({"prompt": [USER], "completion": [REPLY]}, None),
        ({"prompt": "q", "completion": "x", **conversation(USER, REPLY)}, None),
        # Null is the same as absent, as Parquet has it; other fields are for the template.
        (conversation(USER | {"name": None}, REPLY | {"tool_calls": None}), None),
        (conversation(USER | {"name": "n"}, REPLY | {"tool_calls": [], "weight": 1}), "the same"),
        (conversation(REPLY, USER, REPLY, USER), "the same"),
        (conversation(USER, USER, REPLY, REPLY), "the same"),
        (conversation(USER | {"content": ""}, REPLY | {"content": ""}), "the same"),
        (conversation({"role": "critic", "content": "x"}, USER, REPLY), "the same"),
    ],
)
def test_conversations_come_in_many_forms(row, messages):
    expected = row["messages"] if messages == "the same" else messages or [USER, REPLY]
    assert load(write("a.jsonl", line(row)), "conversations") == [{"messages": expected}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "q"}], "chosen": REPLY, "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": [{"from": "gpt", "value": "b"}],
        },
        {
            "chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "rejected": [USER, {"from": "gpt", "value": "b"}],
        },
        PAIR | {"prompt": [{"from": "human", "value": "q"}]},
        PAIR
        | {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
            "chosen": [USER, REPLY],
            "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "b"}]}],
        },
    ],
)
def test_comparisons_come_in_sharegpts_form_and_in_parts_too(row):
    expected = {"prompt": [USER], "chosen": "a", "rejected": "b", "margin": 0.0}
    assert load(write("a.jsonl", line(row)), "comparisons") == [expected]


BAD_ROWS = [
    ("text", '{"text": "\\ud83d"}', "text: expected text, found half of a surrogate pair"),
    ("text", b'{"text": "\xed\xa0\xbd"}', "expected JSON in UTF-8"),
    ("text", b'{"text": "\xe9"}', "expected JSON in UTF-8"),
    ("text", '{"text": NaN}', "text: expected text, found float: NaN"),
    ("text", '{"text": "a", "text": "b"}', "the field 'text' is there twice"),
    ("text", '{"text": ' + "[" * 900 + "]" * 900 + "}", "text: expected text, found list"),
    ("text", '{"text": ' + "[" * 9999, "objects or lists are nested too deeply"),
    ("text", "9" * 5000, "a whole number has too many digits"),
    ("text", "{}", "a row of text needs a field 'text'; there are none"),
    ("text", '{"\\ud83d": "a"}', "needs a field 'text'"),
    ("conversations", line(conversation()), "messages: expected a list of messages, found list"),
    ("conversations", line(conversation(None)), r"messages\[0\]: expected an object with role"),
    ("conversations", line(conversation("x")), r"messages\[0\]: expected an object with role"),
    (
        "conversations",
        line(conversation({"content": "x"})),
        r"messages\[0\]: expected an object with role as text",
    ),
    (
        "conversations",
        line(conversation({"role": 1, "content": "x"})),
        r"messages\[0\]: role: expected text, found int: 1",
    ),
    (
        "conversations",
        line(conversation(USER, {"role": "asistant", "content": "x"})),
        r"messages\[1\]: role: there is no role 'asistant'; did you mean 'assistant'",
    ),
    (
        "conversations",
        line(conversation(USER | {"role": "User"}, REPLY)),
        "there is no role 'User'; did you mean 'user'",
    ),
    (
        "conversations",
        line(conversation(USER | {"role": "human"}, REPLY)),
        "there is no role 'human'; did you mean 'user'",
    ),
    ("conversations", line(conversation(USER | {"role": " "}, REPLY)), "role: expected text"),
    (
        "conversations",
        line(conversation(USER, REPLY | {"content": None})),
        r"messages\[1\]: content: expected text or a list of parts, found NoneType",
    ),
    (
        "conversations",
        line(conversation(USER, REPLY | {"content": []})),
        "content: expected text or a list of parts, found list",
    ),
    (
        "conversations",
        line(conversation(USER | {"content": [{"type": "image_url", "image_url": 1}]}, REPLY)),
        r"messages\[0\]: content\[0\]: a part of type 'image_url', but only text parts are read",
    ),
    (
        "conversations",
        line(conversation(USER | {"content": ["x"]}, REPLY)),
        r"content\[0\]: expected a part like",
    ),
    (
        "conversations",
        line(conversation(USER | {"content": [{"type": "text", "text": LONE}]}, REPLY)),
        r"messages\[0\]: content\[0\]: text: expected text, found half of a surrogate pair",
    ),
    (
        "conversations",
        line(conversation(USER | {"name": LONE}, REPLY)),
        r"messages\[0\]: name: expected text, found half of a surrogate pair",
    ),
    (
        "conversations",
        line(conversation(USER | {LONE: 1}, REPLY)),
        r"messages\[0\]: the name of a field: expected text",
    ),
    (
        "conversations",
        line(conversation(USER, REPLY | {"tool_calls": [{"id": "1"}], "content": None})),
        r"messages\[1\]: tool_calls: of a reply only the content is trained on",
    ),
    (
        "conversations",
        line(conversation(USER, REPLY | {"reasoning_content": "r"})),
        r"messages\[1\]: reasoning_content: of a reply only the content is trained on",
    ),
    (
        "conversations",
        line(conversation(USER, REPLY | {"tool_calls": [{"x": 1e400}]})),
        r"messages\[1\]: tool_calls\[0\].x: expected a finite number",
    ),
    (
        "conversations",
        line(conversation({"from": "human", "value": "q"}, {"from": "robot", "value": "a"})),
        r"messages\[1\]: from: expected one of system, human, .* found str: \"robot\"",
    ),
    (
        "conversations",
        line(conversation({"from": "human"}, REPLY)),
        r"messages\[0\]: value: expected text or a list of parts, found NoneType",
    ),
    (
        "conversations",
        line({"conversations": [{"from": "system", "value": "x"}, REPLY], "system": "y"}),
        "system: expected one system message",
    ),
    (
        "conversations",
        line({"prompt": [USER, REPLY], "completion": "a"}),
        "prompt: expected messages that the assistant is to answer",
    ),
    ("comparisons", line(PAIR | {"margin": 1e400}), "margin: expected a number in the range"),
    ("comparisons", line(PAIR | {"margin": 1e39}), "margin: expected a number in the range"),
    ("comparisons", line(PAIR | {"margin": 10**400}), "margin: expected a number in the range"),
    ("comparisons", line(PAIR | {"margin": True}), "margin: expected a number, found bool"),
    ("comparisons", line(PAIR | {"chosen": LONE}), "chosen: expected text, found half"),
    ("comparisons", line(PAIR | {"rejected": LONE}), "rejected: expected text, found half"),
    ("comparisons", line(PAIR | {"prompt": LONE}), "prompt: expected text, found half"),
    (
        "comparisons",
        line({"chosen": f"\n\nHuman: {LONE}\n\nAssistant: a", "rejected": "x"}),
        "chosen: expected text, found half",
    ),
    (
        "comparisons",
        line(PAIR | {"prompt": [USER, REPLY]}),
        "prompt: expected messages that the assistant is to answer, found the roles user, assist",
    ),
    (
        "comparisons",
        line(PAIR | {"chosen": [REPLY | {"tool_calls": [1]}]}),
        "chosen: tool_calls: of a reply only the content is trained on and scored",
    ),
    ("prompts", line({"prompt": "q", "a": 1e400}), "a: expected a finite number"),
    ("prompts", line({"prompt": "q", "a": float("nan")}), "a: expected a finite number"),
    ("prompts", line({"prompt": "q", "a": 10**400}), "a: expected a whole number of 64 bits"),
    ("prompts", line({"prompt": "q", "a": [{"b": LONE}]}), r"a\[0\].b: expected text, found half"),
    ("prompts", line({"prompt": "q", LONE: 1}), "the name of a field: expected text"),
    ("prompts", line({"prompt": LONE}), "prompt: expected text, found half"),
    ("prompts", line({"prompt": [USER, REPLY]}), "prompt: expected messages that the assistant"),
    (
        "prompts",
        '{"prompt": "q", "a": ' + '{"a": ' * 300 + "1" + "}" * 301,
        "a.a.a.*: objects or lists are nested over 100 deep",
    ),
]


@pytest.mark.parametrize("kind, text, message", BAD_ROWS)
def test_a_malformed_row_is_named_and_can_be_skipped(kind, text, message):
    good = line(PAIR | conversation(USER, REPLY) | {"text": "a"}).encode()
    content = text if isinstance(text, bytes) else text.encode()
    write("a.jsonl", good + b"\n" + content + b"\n" + good)
    with pytest.raises(UserError, match=f"^a.jsonl:2: .*{message}"):
        load("a.jsonl", kind)
    assert 'data.on_bad_row="skip" leaves such rows out' in refusal("a.jsonl", kind)
    assert len(load("a.jsonl", kind, skip_bad_rows=True)) == 2
    write("b.jsonl", content)
    assert "b.jsonl: all 1 rows are bad; the first:" in refusal("b.jsonl", kind, skip_bad_rows=True)


def test_a_bad_row_of_an_array_can_be_skipped_too():
    write("a.json", '[{"text": "a"}, {"text": "b", "text": "c"}, {"n": ' + "9" * 5000 + "}, 1]")
    assert load("a.json", skip_bad_rows=True) == [{"text": "a"}]


def test_what_nothing_reads_may_be_anything():
    row = '{"text": "a", "x": NaN, "y": 1e400, "z": ' + "9" * 400 + ', "u": "\\ud83d"}'
    assert load(write("a.jsonl", row)) == [{"text": "a"}]


# ------------------------------------------------------------------------------------------ Parquet


def write_parquet(name, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), name)
    return name


def test_a_value_of_parquet_that_python_lacks_is_named_and_can_be_skipped():
    broken = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, pyarrow.array([b"a", b"\xff\xfe"], pyarrow.binary()).buffers()
    )
    write_parquet("a.parquet", text=broken)
    assert "a.parquet: row 2: text: 'utf-8' codec can't decode" in refusal("a.parquet")
    assert load("a.parquet", skip_bad_rows=True) == [{"text": "a"}]
    late = pyarrow.array([0, 2**62], pyarrow.timestamp("us"))
    write_parquet("b.parquet", prompt=["q", "r"], time=late)
    assert "b.parquet: row 2: time: " in refusal("b.parquet", "prompts")
    assert load("b.parquet", "prompts", skip_bad_rows=True) == [
        {"prompt": [USER], "columns": {"time": "1970-01-01 00:00:00"}}
    ]
    zone = pyarrow.array([0], pyarrow.timestamp("us", tz="Mars/Base"))
    write_parquet("c.parquet", prompt=["q"], time=zone)
    assert "c.parquet: row 1: time: " in refusal("c.parquet", "prompts")


def test_numbers_and_types_of_parquet():
    number = [decimal.Decimal("1.5")]
    write_parquet("a.parquet", prompt=["q"], chosen=["a"], rejected=["b"], margin=number)
    assert load("a.parquet", "comparisons")[0]["margin"] == 1.5
    for values, message in (
        (pyarrow.array([float("inf")]), "x: expected a finite number"),
        (pyarrow.array([2**64 - 1], pyarrow.uint64()), "x: expected a whole number of 64 bits"),
        (pyarrow.array([b"a"], pyarrow.binary()), "x: expected a value that JSON can express"),
    ):
        write_parquet("b.parquet", prompt=["q"], x=values)
        assert f"b.parquet: row 1: {message}" in refusal("b.parquet", "prompts")
    assert "text: expected text, found bytes" in refusal(write_parquet("c.parquet", text=[b"a"]))
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(twice, "d.parquet")
    assert "d.parquet: the column 'text' is there twice" in refusal("d.parquet")
    assert "e.parquet: empty" in refusal(
        write_parquet("e.parquet", text=pyarrow.array([], pyarrow.string()))
    )


def test_messages_of_parquet_have_no_fields_that_are_null():
    rows = [
        conversation(USER | {"name": "n"}, REPLY),
        conversation(USER | {"content": None}, REPLY),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "a.parquet")
    assert load("a.parquet", "conversations", skip_bad_rows=True) == [
        conversation(USER | {"name": "n"}, REPLY)
    ]


def test_a_call_of_a_tool_in_a_prompt_is_kept_for_the_template():
    call = {"role": "assistant", "tool_calls": [{"id": "1"}]}
    result = {"role": "tool", "content": "4", "name": None}
    write("a.jsonl", line({"prompt": [USER, call | {"content": None}, result]}))
    [example] = load("a.jsonl", "prompts")
    assert example["prompt"] == [USER, call | {"content": ""}, {"role": "tool", "content": "4"}]


def test_no_damage_to_a_file_is_more_than_one_line(monkeypatch):
    """Flip, remove and add bytes of files in every form, the same ones in each run of the test."""
    monkeypatch.setattr(json_array, "CHARACTERS", 16)
    rows = [conversation(USER | {"tags": [{"n": 1.5e3}]}, REPLY), conversation(USER, REPLY)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "good.parquet")
    contents = {
        "a.jsonl": "\n".join(map(line, rows)).encode(),
        "a.json": json.dumps(rows, indent=1).encode(),
        "a.json.gz": compress(json.dumps(rows).encode()),
        "a.parquet": Path("good.parquet").read_bytes(),
    }
    generator = random.Random(0)
    outcomes = collections.Counter()
    for name, content in contents.items():
        for _ in range(60):
            write(name, damaged(content, generator))
            for skip in (False, True):
                try:
                    load(name, "conversations", skip_bad_rows=skip)
                    outcomes["read"] += 1
                except UserError as error:
                    assert "\n" not in str(error)
                    outcomes["refused"] += 1
    assert outcomes["read"] > 20 and outcomes["refused"] > 200


def damaged(content, generator):
    """Return bytes with up to three accidents."""
    changed = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        place = generator.randrange(len(changed) or 1)
        accident = generator.choice(["flip", "flip", "insert", "remove", "cut"])
        if accident == "insert":
            changed.insert(place, generator.randrange(256))
        elif accident == "cut" and generator.random() < 0.3:
            del changed[place:]
        elif changed:
            changed[place : place + 1] = b"" if accident == "remove" else generator.randbytes(1)
    return bytes(changed)


# --------------------------------------------------------------------------- shares of processes


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_each_process_parses_its_share_of_every_form(name, monkeypatch):
    rows = [{"text": f"t{i}"} for i in range(7)]
    if name == "a.parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)
    else:
        write(name, json.dumps(rows) if name == "a.json" else "\n".join(map(line, rows)))
    monkeypatch.setattr("jax.process_count", lambda: 3)
    shares = []
    for process in range(3):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        share = list(raw_rows.read(name))
        assert all(row.value == rows[row.number - 1] for row in share)
        shares.append([row.number for row in share])
    assert shares == [[3, 6], [1, 4, 7], [2, 5]]


# ------------------------------------------------------------------------------ names of one's own


def test_data_columns_gives_fields_names_of_ones_own():
    row = {"question": "q", "good": "a", "bad": "b", "prompt": "an id", "sure": 2}
    write("a.jsonl", line(row) + "\n" + line({"question": "q", "good": "a"}))
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad", "margin": "sure"}
    message = refusal("a.jsonl", "comparisons", columns=columns)
    assert message.startswith(
        "a.jsonl:2: data.columns says that rejected is in the column 'bad', which the row lacks"
    )
    [example] = load("a.jsonl", "comparisons", columns=columns, skip_bad_rows=True)
    assert example == {"prompt": [USER], "chosen": "a", "rejected": "b", "margin": 2.0}
    swapped = {"chosen": "rejected", "rejected": "chosen"}
    [example] = load(write("b.jsonl", line(PAIR)), "comparisons", columns=swapped)
    assert (example["chosen"], example["rejected"]) == ("b", "a")
    renamed = {"prompt": "question", "answer": "good"}
    [example, _] = load("a.jsonl", "prompts", columns=renamed)
    assert example["prompt"] == [USER]
    assert example["columns"] == {"answer": "a", "bad": "b", "sure": 2}
    assert "did you mean 'question'" in refusal("a.jsonl", "prompts", columns={"prompt": "qestion"})
    assert "data.columns: rows of comparisons have no field 'promt'; did you mean 'prompt'" in (
        refusal("a.jsonl", "comparisons", columns={"promt": "question"})
    )
    write_parquet("a.parquet", body=["a", "b"])
    assert load("a.parquet", columns={"text": "body"}) == [{"text": "a"}, {"text": "b"}]


def test_data_columns_on_the_command_line(directory):
    write("pairs.jsonl", "")
    for overrides in (
        {"data.columns.prompt": "question", "data.columns.chosen": "good"},
        {"data.columns": '{"prompt": "question", "chosen": "good"}'},
    ):
        c = configs.load("rm.py", {"data.train": "pairs.jsonl", **overrides})
        assert c.data.columns == {"prompt": "question", "chosen": "good"}
        assert sources.read_options(c, "comparisons", print).columns == c.data.columns
        assert sources.read_options(c, "conversations", print).columns == {}
    for text in ("question", "[1]", '{"prompt": 1}', '{"prompt": ""}', "[" * 9999):
        with pytest.raises(UserError, match="data.columns=.*expected a JSON object of texts"):
            configs.load("rm.py", {"data.train": "pairs.jsonl", "data.columns": text})
    for train in ("toy/comparisons-clean", "0.5*tfds/shp:a=1,b=2,0.5*toy/comparisons-noisy"):
        with pytest.raises(UserError, match="data.columns=.* has a meaning for files only"):
            configs.load("rm.py", {"data.train": train, "data.columns.prompt": "question"})


# ----------------------------------------------------------------------------------- whole sources


@pytest.mark.parametrize("text", ["", " ", ",", ",,"])
def test_a_run_needs_something_to_train_on_and_to_hold_out(text):
    for field in ("data.train", "data.heldout"):
        with pytest.raises(UserError, match=f"{field}={text!r} must name a source"):
            configs.load("lm.py", {field: text})
    with pytest.raises(UserError, match="needs ppo.pretrain_data, which is empty"):
        configs.load("ppo.py", {"ppo.pretrain_data": text})


def test_a_held_out_set_that_is_the_training_set_is_refused(directory):
    write("a.jsonl", '{"text": "a"}\n{"text": "b"}')
    config = configs.Config()
    for heldout in ("a.jsonl", "./a.jsonl", "*.jsonl", f"{directory}/a.jsonl"):
        with pytest.raises(UserError, match="held out"):
            mixture.sets(config, "text", "a.jsonl", heldout, lambda text: None)
    with pytest.raises(UserError, match="a held-out source has none"):
        mixture.sets(config, "text", "a.jsonl", "0.5*a.jsonl,0.5*toy/text", lambda text: None)


def test_a_text_of_a_published_set_must_be_text():
    row = published.Row("a/1", "a:1", {"text": LONE, "number": 10**400})
    with pytest.raises(UserError, match="^a:1: text: expected text, found half of a surrogate"):
        published.field(row, "text", str)
    with pytest.raises(UserError, match="^a:1: number: expected a number"):
        published.field(row, "number", float)


def test_files_must_be_the_same_for_every_process(monkeypatch):
    write("a.jsonl", '{"text": "a"}')
    monkeypatch.setattr(
        files.shares, "exchange", lambda value: [value, [[], "a.jsonl: no such file"]]
    )
    with pytest.raises(UserError, match="process 1 finds a.jsonl: no such file, process 0 finds"):
        files.read("a.jsonl", "text")
