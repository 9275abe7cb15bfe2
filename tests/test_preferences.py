"""The public sets of comparisons, against counts made by hand.

The fixtures are in the published formats, with their oddities.
"""

import gzip
import hashlib
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from alignjax import config as configs
from alignjax.config import UserError
from alignjax.data import formats, mixture, prepare, sources, transcripts
from alignjax.data import preferences as prefs
from alignjax.data.preferences import hh, prm800k, shp, summarize
from alignjax.data.preferences import rows as published_rows
from alignjax.machine import console

ROOT = Path(__file__).resolve().parent.parent
HELLO = "\n\nHuman: Hello\n\nAssistant:"


def write(path, rows):
    """Write JSON lines as published: in ASCII, gzipped if the name says so.

    A row that is a text is written as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def user(text):
    return [{"role": "user", "content": text}]


def prepared(spec, manual, data):
    """Prepare a set, and return its report and the rows of each split by id."""
    prepare.prepare(spec, str(manual), str(data))
    splits = prefs.report(spec, str(data))["splits"]
    rows = {split: prefs.read(spec, split, str(data)) for split in splits}
    return splits, {split: {row["id"]: row for row in rows[split]} for split in splits}


# ------------------------------------------------------------------------------------- transcripts


def test_a_transcript_becomes_messages():
    text = "\n\nHuman: Hi there\n\nsecond line\n\nAssistant: Human: no\n\nHuman: So?\n\nAssistant:"
    assert transcripts.parse(text) == [
        {"role": "user", "content": "Hi there\n\nsecond line"},
        {"role": "assistant", "content": "Human: no"},
        {"role": "user", "content": "So?"},
        {"role": "assistant", "content": ""},
    ]
    assert transcripts.parse("Human: Hi") == user("Hi")
    assert transcripts.parse("Hi\n\nHuman: there") is None
    assert transcripts.parse("") is None


def talk(*contents):
    """Return messages with these contents, of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def test_two_conversations_become_one_comparison():
    one = talk("a", "b", "c", "d")
    other = talk("a", "b", "c", "e")
    assert transcripts.difference_fault(one, other) == ""
    assert formats.example_of({"chosen": one, "rejected": other}, "comparisons") == {
        "prompt": talk("a", "b", "c"),
        "chosen": "d",
        "rejected": "e",
        "margin": 0.0,
    }
    for one, other, reason in [
        (talk("a", "b"), talk("x", "c"), "differ before"),
        (talk("a", "b", "c", "d"), talk("a", "b"), "differ before"),
        (talk("a", "b", "c"), talk("a", "b", "d"), "does not end with a message of the assistant"),
        (talk("a", "b")[1:], talk("a", "c")[1:], "no message of the user"),
        (
            [*talk("a", "b"), talk("a", "c")[1]],
            [*talk("a", "b"), talk("a", "d")[1]],
            "no message of the user",
        ),
    ]:
        assert reason in transcripts.difference_fault(one, other)


# ---------------------------------------------------------------------------------------------- HH


@pytest.fixture
def hh_files(tmp_path):
    """Write helpful-base, with each oddity of the real files."""
    twice = "\n\nHuman: One\n\nHuman: Two\n\nAssistant:"
    rows = [
        {"chosen": f"{HELLO} Good “day”", "rejected": f"{HELLO} Go away"},
        {"chosen": f"{HELLO} Yes", "rejected": HELLO},  # an empty reply
        {"chosen": f"{twice} b", "rejected": f"{twice} c"},  # two turns of one role in a row
        # The same at the end.
        {"chosen": f"{HELLO} a\n\nAssistant: b", "rejected": f"{HELLO} a\n\nAssistant: c"},
        # These differ before the last turn.
        {"chosen": f"{HELLO} x", "rejected": "\n\nHuman: Bye\n\nAssistant: x"},
        {"chosen": f"{HELLO} same", "rejected": f"{HELLO} same "},
        {"chosen": "no turns", "rejected": "none"},
    ]
    write(tmp_path / "helpful-base/train.jsonl.gz", rows)
    write(tmp_path / "helpful-base/test.jsonl.gz", rows[:2])
    return tmp_path


def test_hh(hh_files, tmp_path):
    splits, rows = prepared("hh_helpful_base", hh_files, tmp_path / "out")
    assert splits["train"] == {
        "rows": 7,
        "pairs": 1,
        "dropped": {
            "an empty reply": 1,
            "two turns of one role in a row": 2,
            "two equal replies": 1,
            "the conversations differ before their last messages": 1,
            "not a transcript of Human and Assistant": 1,
        },
    }
    assert splits["test"] == {"rows": 2, "pairs": 1, "dropped": {"an empty reply": 1}}
    assert rows["train"] == {
        "helpful-base/train/1": {
            "id": "helpful-base/train/1",
            "dataset": "hh_helpful_base",
            "prompt": user("Hello"),
            "chosen": "Good “day”",
            "rejected": "Go away",
            "margin": 0.0,
            "ratio": 0.0,
            "where": "hh_helpful_base/train helpful-base/train/1",
        }
    }
    heldout = prefs.read("hh_helpful_base", "heldout", str(tmp_path / "out"))
    assert heldout[0]["id"] == "helpful-base/test/1"


def test_hh_options_keep_rows(hh_files, tmp_path):
    spec = "hh_helpful_base:empty=keep,same_role=keep"
    splits, rows = prepared(spec, hh_files, tmp_path / "out")
    assert splits["train"]["dropped"] == {
        "there is no message of the user before the last one": 1,
        "two equal replies": 1,
        "the conversations differ before their last messages": 1,
        "not a transcript of Human and Assistant": 1,
    }
    assert rows["train"]["helpful-base/train/2"]["rejected"] == ""
    assert rows["train"]["helpful-base/train/3"]["prompt"] == user("One") + user("Two")
    # Other options are another directory.
    assert prefs.report("hh_helpful_base", str(tmp_path / "out")) is None


# --------------------------------------------------------------------------------------- summarize


def summaries(choice, split, batch, texts=(" first", " second "), **info):
    return {
        "info": {"id": "t3_x"} | info,
        "summaries": [{"text": t, "policy": "ref", "note": None} for t in texts],
        "choice": choice,
        "worker": "w",
        "batch": batch,
        "split": split,
        "extra": {"confidence": 8},
    }


@pytest.fixture
def summarize_files(tmp_path):
    post = {"post": "Post \n\nmore ", "title": "Title", "subreddit": "pets"}
    for name in summarize.FILES:
        write(tmp_path / name, [])
    write(
        tmp_path / "batch3.json",
        [
            summaries(1, "train", "batch3", **post),
            summaries(0, "valid1", "batch3", **post),
            summaries(0, "train", "batch3", texts=(" a", " a "), **post),
            summaries(0, "train", "batch3", texts=("a", " "), **post),
        ],
    )
    write(
        tmp_path / "batch22.json",
        [summaries(0, "train", "batch22", **post), summaries(0, "valid2", "batch22", **post)],
    )
    write(
        tmp_path / "cnndm0.json",
        [summaries(1, "valid2", "cnndm0", article="News\n", site="cnn", title="T", post=None)],
    )
    return tmp_path


def test_summarize(summarize_files, tmp_path):
    splits, rows = prepared("summarize", summarize_files, tmp_path / "out")
    assert splits == {
        "train": {"rows": 4, "pairs": 2, "dropped": {"two equal replies": 1, "an empty reply": 1}},
        "validation": {"rows": 1, "pairs": 1, "dropped": {}},
        "test": {"rows": 2, "pairs": 1, "dropped": {"about a news article": 1}},
    }
    prompt = user("SUBREDDIT: r/pets\n\nTITLE: Title\n\nPOST: Post \n\nmore\n\nTL;DR:")
    row = rows["train"]["batch3/1"]
    assert (row["prompt"], row["chosen"], row["rejected"]) == (prompt, "second", "first")
    assert rows["test"].keys() == {"batch22/2"} and rows["test"]["batch22/2"]["chosen"] == "first"


def test_summarize_options(summarize_files, tmp_path):
    spec = "summarize:cnndm=keep,layout=post,train=sup4"
    splits, rows = prepared(spec, summarize_files, tmp_path / "out")
    assert splits["train"]["dropped"]["not of batches 3 to 10"] == 1
    assert splits["train"]["pairs"] == 1
    assert rows["train"]["batch3/1"]["prompt"] == user("Post \n\nmore\n\nTL;DR:")
    news = rows["test"]["cnndm0/1"]
    assert (news["prompt"], news["chosen"]) == (user("Article:\nNews\n\nTL;DR:"), "second")


# --------------------------------------------------------------------------------------------- SHP


def votes(post, label, ratio, a="A", b="B"):
    return {
        "post_id": post,
        "domain": "askhr_train",
        "upvote_ratio": 0.98,
        "history": f"Post {post}?",
        "c_root_id_A": "c1",
        "c_root_id_B": "c2",
        "created_at_utc_A": 1,
        "created_at_utc_B": 2,
        "score_A": 9,
        "score_B": 3,
        "human_ref_A": a,
        "human_ref_B": b,
        "labels": label,
        "seconds_difference": 1.0,
        "score_ratio": ratio,
    }


@pytest.fixture
def shp_files(tmp_path):
    for name in shp.SUBREDDITS:
        for split in ("train", "validation", "test"):
            write(tmp_path / name / f"{split}.json", [])
    rows = [
        votes("p", 1, 3.0),
        votes("p", 0, 1.5),
        *[votes("p", 0, 2.0, b=f"B{i}") for i in range(6)],
        votes("q", 1, 8),
    ]
    write(tmp_path / "askhr/train.json", rows)
    write(tmp_path / "legaladvice/train.json", [votes("r", 0, 4.0, b=" ")])
    write(tmp_path / "askhr/validation.json", [votes("v", 1, 1.1)])
    write(tmp_path / "askhr/test.json", rows)
    return tmp_path


def test_shp_filters_only_the_training_split(shp_files, tmp_path):
    splits, rows = prepared("shp", shp_files, tmp_path / "out")
    assert splits == {
        "train": {
            "rows": 10,
            "pairs": 6,
            "dropped": {
                "more than 5 of one post": 2,
                "score_ratio below 2": 1,
                "an empty reply": 1,
            },
        },
        "validation": {"rows": 1, "pairs": 1, "dropped": {}},
        "test": {"rows": 9, "pairs": 9, "dropped": {}},
    }
    assert rows["train"].keys() == {f"askhr/train/{i}" for i in (1, 3, 4, 5, 6, 9)}
    first = rows["train"]["askhr/train/1"]
    assert first["prompt"] == user("Post p?") and first["ratio"] == 3.0
    assert (first["chosen"], first["rejected"]) == ("A", "B")
    third = rows["train"]["askhr/train/3"]
    assert (third["chosen"], third["rejected"], third["ratio"]) == ("B0", "A", 2.0)
    assert rows["test"]["askhr/test/2"]["ratio"] == 1.5


def test_shp_options(shp_files, tmp_path):
    splits, rows = prepared(
        "shp:min_score_ratio=1,pairs_per_post=0,history_chars=4", shp_files, tmp_path / "out"
    )
    assert splits["train"] == {"rows": 10, "pairs": 9, "dropped": {"an empty reply": 1}}
    assert {row["prompt"][0]["content"] for row in rows["train"].values()} == {"Post"}
    splits, rows = prepared("shp:pairs_per_post=1,min_score_ratio=3", shp_files, tmp_path / "out")
    assert splits["train"]["pairs"] == 2
    assert [p.name for p in sorted((tmp_path / "out/shp").iterdir()) if p.is_dir()] == [
        "min_score_ratio_1.0-pairs_per_post_0-history_chars_4",
        "min_score_ratio_3.0-pairs_per_post_1",
    ]


# ----------------------------------------------------------------------------------------- PRM800K


def step(*rated, chosen=None, human=None):
    """Return a step with completions, each given as (text, rating)."""
    completions = [
        {"text": text, "rating": rating, "flagged": None} for text, rating in rated
    ] or None
    return {"completions": completions, "human_completion": human, "chosen_completion": chosen}


def judged(problem, steps, finish, generated=None, control=False, screening=False):
    question = {"problem": problem, "ground_truth_answer": "4", "pre_generated_steps": generated}
    return {
        "labeler": "l",
        "timestamp": "t",
        "generation": None,
        "is_quality_control_question": control,
        "is_initial_screening_question": screening,
        "question": question,
        "label": {"steps": steps, "total_time": 1, "finish_reason": finish},
    }


@pytest.fixture
def prm_files(tmp_path):
    def first(written):
        return judged(
            "2+2?",
            [
                step(("add", 1), ("hm", 0), ("subtract", -1), ("sum", 1), ("odd", None), chosen=0),
                step(human=written),  # completions null, and the labeler wrote the step
                step(("4", 1), ("5", -1), chosen=0),
            ],
            "solution",
        )

    write(
        tmp_path / "phase1_train.jsonl",
        [
            first({"text": "by hand", "rating": None, "source": "human"}),
            judged("bad", [step(("x", -1))], "give_up"),
        ],
    )
    wrong = judged(
        "2+2?",
        [step(("go", 1), chosen=0), step(("5", -1), ("6", 0))],
        "found_error",
        ["go", "5", "# Answer\n\n5"],
    )
    right = judged(
        "2+2?",
        [step(("so", 1), chosen=0), step(("it is 4", 1), chosen=0)],
        "solution",
        ["so", "it is 4"],
    )
    write(
        tmp_path / "phase2_train.jsonl",
        [
            wrong,
            judged("2+2?", [], "solution", control=True),
            right,
            wrong,
            judged("2+2?", [], "solution", screening=True),
            wrong,
        ],
    )
    write(tmp_path / "phase2_test.jsonl", [right, wrong])
    write(tmp_path / "phase1_test.jsonl", [first("by hand")])
    return tmp_path


def test_prm800k(prm_files, tmp_path):
    splits, rows = prepared("prm800k", prm_files, tmp_path / "out")
    # Steps: 2 x 1 and 1 x 1 of the first row. Solutions: two right (rows 1/1 and 2/3), and three
    # wrong (2/1, 2/4, 2/6).
    assert splits["train"] == {
        "rows": 8,
        "pairs": 5,
        "dropped": {"no pair in it": 2, "quality control": 1, "screening of labelers": 1},
    }
    assert splits["test"] == {"rows": 2, "pairs": 1, "dropped": {}}
    texts = {
        key: (row["prompt"], row["chosen"], row["rejected"]) for key, row in rows["train"].items()
    }
    assert texts == {
        "phase1_train/1/0/0-2": (user("2+2?"), "add", "subtract"),
        "phase1_train/1/0/3-2": (user("2+2?"), "sum", "subtract"),
        "phase1_train/1/2/0-1": (user("2+2?\n\nadd\nby hand"), "4", "5"),
        "phase1_train/1-phase2_train/1": (user("2+2?"), "add\nby hand\n4", "go\n5\n# Answer\n\n5"),
        "phase2_train/3-phase2_train/4": (user("2+2?"), "so\nit is 4", "go\n5\n# Answer\n\n5"),
    }


def test_prm800k_options(prm_files, tmp_path):
    splits, rows = prepared("prm800k:phases=1,solutions=false", prm_files, tmp_path / "out")
    assert splits["train"] == {"rows": 2, "pairs": 3, "dropped": {"no pair in it": 1}}
    assert splits["test"]["rows"] == 1 and "phase1_test/1/0/0-2" in rows["test"]
    assert rows["test"]["phase1_test/1/2/0-1"]["prompt"] == user("2+2?\n\nadd\nby hand")


# --------------------------------------------------------------------------------------- every set


def test_rows_add_up_and_ids_are_unique(shp_files, summarize_files, hh_files, tmp_path):
    for spec in ("shp", "summarize", "hh_helpful_base"):
        splits, rows = prepared(spec, tmp_path, tmp_path / "out")
        for split, counts in splits.items():
            assert counts["rows"] == counts["pairs"] + sum(counts["dropped"].values())
            read = prefs.read(spec, split, str(tmp_path / "out"))
            assert counts["pairs"] == len(rows[split]) == len(read)
            assert all(row["prompt"][-1]["role"] == "user" for row in rows[split].values())


def test_read_returns_the_same_rows_again_and_no_more_than_the_limit(shp_files, tmp_path):
    prepare.prepare("shp", str(shp_files), str(tmp_path / "out"))
    rows = prefs.read("shp", "heldout", str(tmp_path / "out"))
    assert prefs.read("shp", "test", str(tmp_path / "out"), limit=4) == rows[:4]
    assert Counter(row["where"] for row in rows) == {
        f"shp/test askhr/test/{i}": 1 for i in range(1, 10)
    }


@pytest.mark.parametrize(
    "spec, message",
    [
        ("hh_helpfull_base", "no set 'hh_helpfull_base'; did you mean 'hh_helpful_base'?"),
        (
            "shp:pair_per_post=1",
            "shp has no option 'pair_per_post'; did you mean 'pairs_per_post'?",
        ),
        ("shp:pairs_per_post=2.5", "pairs_per_post=2.5: int wanted, float given"),
        ("shp:min_score_ratio=-1", "min_score_ratio=-1: it must be finite and not below 0"),
        ("shp:", "shp has no option ''"),
        ("prm800k:solutions=1", "solutions=1: bool wanted, int given"),
        ("prm800k:phases=3", "phases=3: there is no such choice; there are: 'both', '1', '2'"),
        ("summarize:layout=pots", "layout=pots: there is no such choice; did you mean 'post'?"),
    ],
)
def test_the_error_of_a_wrong_spec_suggests_the_right_one(spec, message):
    with pytest.raises(UserError) as caught:
        prefs.find(spec)
    assert message in str(caught.value) and str(caught.value).startswith(spec)


def test_the_order_of_options_and_the_spelling_of_numbers_do_not_matter(tmp_path):
    def directory(spec):
        return prefs.directory(spec, str(tmp_path))

    expected = tmp_path / "shp/min_score_ratio_3.0-pairs_per_post_2/1.0.0"
    assert directory("shp:pairs_per_post=2,min_score_ratio=3") == expected
    assert directory("shp:min_score_ratio=3.0,pairs_per_post=2") == expected
    assert directory("prm800k:solutions=false").parent.name == "solutions_false"
    assert directory("shp:min_score_ratio=2") == tmp_path / "shp/default/1.0.0"


def test_a_damaged_set_is_named_with_what_to_do(hh_files, tmp_path):
    out = tmp_path / "out"
    prepared("hh_helpful_base", hh_files, out)
    directory = prefs.directory("hh_helpful_base", str(out))
    message = f"remove {directory} and prepare hh_helpful_base again"
    [data] = directory.glob("*train*")
    data.write_bytes(data.read_bytes()[:40])
    with pytest.raises(UserError, match=message):
        prefs.read("hh_helpful_base", "train", str(out))
    for text in ("", "[]", "{}", '{"splits": {"train": 3}}', '{"splits": {"train": {}}}'):
        (directory / "metadata.json").write_text(text)
        with pytest.raises(UserError, match=f"metadata.json: damaged; {message}"):
            prefs.read("hh_helpful_base", "train", str(out))


def test_a_place_that_cannot_be_written_to_is_one_line(hh_files, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="hh_helpful_base: cannot write to .*Not a directory"):
        prepare.prepare("hh_helpful_base", str(hh_files), str(tmp_path / "file"))


def test_reading_a_set_that_is_not_prepared_names_the_command(hh_files, tmp_path):
    with pytest.raises(
        UserError,
        match=r"not prepared in .*/out/shp/default/1\.0\.0; python -m alignjax.data.prepare shp",
    ):
        prefs.read("shp", "train", str(tmp_path / "out"))
    prepare.prepare("hh_helpful_base", str(hh_files), str(tmp_path / "out"))
    with pytest.raises(UserError, match="there is no split 'tset'; did you mean 'test'"):
        prefs.read("hh_helpful_base", "tset", str(tmp_path / "out"))


# ---------------------------------------------------------------------------------- malformed rows

GOOD = {
    "hh_helpful_base": {"chosen": f"{HELLO} a", "rejected": f"{HELLO} b"},
    "summarize": summaries(1, "train", "batch3", post="p", title="t", subreddit="s"),
    "shp": votes("p", 1, 3.0),
    "prm800k": judged("2+2?", [step(("4", 1), ("5", -1), chosen=0)], "solution"),
}
FIRST = {
    "hh_helpful_base": "helpful-base/train.jsonl.gz",
    "summarize": "batch3.json",
    "shp": "askacademia/train.json",
    "prm800k": "phase1_train.jsonl",
}


def broken(name, path, *value):
    """The good row of a set without the field at `path`, or with another value there."""
    row = json.loads(json.dumps(GOOD[name]))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = row
    for part in parents:
        place = place[part]
    place.pop(last)
    if value:
        place[last] = value[0]
    return row


@pytest.mark.parametrize(
    "name, bad, message",
    [
        ("hh_helpful_base", '{"chosen": ', "not JSON"),
        ("hh_helpful_base", '["a", "b"]', "expected an object, found list"),
        (
            "hh_helpful_base",
            {"chosen": "a", "rejectd": "b"},
            "expected a field 'rejected'; did you mean 'rejectd'?",
        ),
        ("hh_helpful_base", {"chosen": 5, "rejected": "b"}, "chosen: expected text, found int: 5"),
        ("summarize", broken("summarize", "choice", 2), "choice: expected 0 or 1, found 2"),
        (
            "summarize",
            broken("summarize", "choice", True),
            "choice: expected a whole number, found bool: true",
        ),
        (
            "summarize",
            broken("summarize", "split", "test"),
            "split: expected one of train, valid1, valid2, found 'test'",
        ),
        ("summarize", broken("summarize", "info.post"), "expected a field 'info.post'"),
        (
            "summarize",
            broken("summarize", "summaries", [{"text": "a"}]),
            "summaries: expected '1.text' in it, found list",
        ),
        (
            "summarize",
            broken("summarize", "info", "x"),
            "info: expected 'article' in it, found str",
        ),
        ("shp", broken("shp", "labels", 7), "labels: expected 0 or 1, found 7"),
        ("shp", broken("shp", "score_ratio", "3"), "score_ratio: expected a number, found str"),
        ("shp", broken("shp", "history", None), "history: expected text, found NoneType: null"),
        (
            "prm800k",
            broken("prm800k", "label.steps.0.completions", {}),
            "label.steps.0.completions: expected a list, found dict",
        ),
        (
            "prm800k",
            broken("prm800k", "label.steps.0.chosen_completion", 9),
            "completions: expected '9.text' in it, found list",
        ),
        (
            "prm800k",
            broken("prm800k", "is_quality_control_question", 0),
            "expected true or false, found int: 0",
        ),
        (
            "prm800k",
            broken("prm800k", "label.steps", []) | {"question": {}},
            "expected a field 'question.problem'",
        ),
    ],
)
def test_a_malformed_row_is_named_and_nothing_is_prepared(name, bad, message, tmp_path, capsys):
    builder, config = prefs.find(name)
    for file in builder(config=config, data_dir=tmp_path / "out").files():
        write(tmp_path / file, [GOOD[name]])
    write(tmp_path / FIRST[name], [GOOD[name], "", bad])
    code = prepare.main([name, "--manual_dir", str(tmp_path), "--data_dir", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 2 and f"alignjax: {tmp_path / FIRST[name]}:3: " in error and message in error
    assert prefs.report(name, str(tmp_path / "out")) is None
    write(tmp_path / FIRST[name], [GOOD[name]])
    if name != "summarize":  # which would have nothing for its other splits
        prepare.prepare(name, str(tmp_path), str(tmp_path / "out"))


def test_a_truncated_file_and_a_git_lfs_pointer_are_named(hh_files, tmp_path):
    path = hh_files / "helpful-base/train.jsonl.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(
        UserError, match=r"train.jsonl.gz:\d+: expected JSON lines in UTF-8: Compressed file ended"
    ):
        prepare.prepare("hh_helpful_base", str(hh_files), str(tmp_path / "out"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(UserError, match="a pointer of Git LFS"):
        prepare.prepare("hh_helpful_base", str(hh_files), str(tmp_path / "out"))


def test_an_empty_split_is_an_error(hh_files, tmp_path):
    write(
        hh_files / "helpful-base/test.jsonl.gz",
        [{"chosen": f"{HELLO} a", "rejected": f"{HELLO} a"}],
    )
    with pytest.raises(UserError, match="nothing is left of test.*'two equal replies': 1"):
        prepare.prepare("hh_helpful_base", str(hh_files), str(tmp_path / "out"))


# ------------------------------------------------------------------------------------- the command


def test_the_command_repeats_its_report_without_preparing_again(
    hh_files, tmp_path, capsys, monkeypatch
):
    arguments = [
        "hh_helpful_base",
        "--manual_dir",
        str(hh_files),
        "--data_dir",
        str(tmp_path / "out"),
    ]
    assert prepare.main(arguments) == 0
    first = capsys.readouterr().out
    digest = hashlib.sha256((hh_files / "helpful-base/train.jsonl.gz").read_bytes()).hexdigest()
    lines = [line.split() for line in first.splitlines()]
    assert ["train", "7", "6", "1"] in lines
    assert ["2", *"two turns of one role in a row".split()] in lines
    published = hh.SHA256["helpful-base/train"]
    assert f"sha256 {digest}  helpful-base/train.jsonl.gz (published: {published})" in first
    monkeypatch.setattr(hh.HH, "compare", None)
    (hh_files / "helpful-base/train.jsonl.gz").unlink()
    assert prepare.main(arguments) == 0
    assert capsys.readouterr().out == first


def test_the_bar_counts_the_bytes_of_all_files(tmp_path, monkeypatch):
    bars = []
    make_bar = console.progress_bar

    def recorded(*arguments, **options):
        bars.append(make_bar(*arguments, **options))
        return bars[0]

    monkeypatch.setattr(console, "progress_bar", recorded)
    for name in ("a.json", "b.json.gz"):
        write(tmp_path / name, [{"x": i} for i in range(1024)])
    paths = {name: tmp_path / name for name in ("a.json", "b.json.gz")}
    assert [row.id for row in published_rows.read_rows(paths, "")] == [
        f"{name}/{i}" for name in "ab" for i in range(1, 1025)
    ]
    assert bars[0].n == bars[0].total == sum(path.stat().st_size for path in paths.values())


def test_missing_files_are_listed_with_where_they_come_from(hh_files, tmp_path, capsys):
    (hh_files / "helpful-base/test.jsonl.gz").unlink()
    directories = ["--manual_dir", str(hh_files), "--data_dir", str(tmp_path / "out")]
    assert prepare.main(["hh_helpful_base", *directories]) == 2
    error = capsys.readouterr().err
    assert f"{hh_files} lacks 1 of 2 files" in error and "helpful-base/train" not in error
    url = "https://media.githubusercontent.com/media/anthropics/hh-rlhf/"
    assert f"DIR/helpful-base/test.jsonl.gz  from {url}" in error


def test_an_interrupted_preparation_leaves_nothing_and_starts_again(
    hh_files, tmp_path, monkeypatch
):
    compare = hh.HH.compare

    def stopped(self, rows, split, dropped):
        yield from compare(self, rows, split, dropped)
        if split == "test":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hh.HH, "compare", stopped)
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare("hh_helpful_base", str(hh_files), str(tmp_path / "out"))
    assert list((tmp_path / "out/hh/helpful_base").iterdir()) == []
    # What SIGKILL leaves.
    leftovers = [
        tmp_path / "out/hh/helpful_base/incomplete.ABC123_1.0.0",
        tmp_path / "out/downloads/hh/x.gz.tmp.0123456789abcdef0123456789abcdef",
    ]
    for path in leftovers:
        path.mkdir(parents=True)
    others = [path.with_name(f"my-{path.name}-notes") for path in leftovers]
    for path in others:
        path.mkdir()
    assert prepared("hh_helpful_base", hh_files, tmp_path / "out")[0]["train"]["pairs"] == 1
    assert not any(path.exists() for path in leftovers)
    assert all(path.exists() for path in others)


def command(patch, *arguments):
    """Start the command in a process of its own, after some lines of Python."""
    lines = ["import runpy, time", "from alignjax.data.preferences import hh", patch]
    code = "\n".join([*lines, "runpy.run_module('alignjax.data.prepare', run_name='__main__')"])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"},
    )


SLOW_COMPARE = """
compare = hh.HH.compare

def slow_compare(*arguments):
    for pair in compare(*arguments):
        time.sleep(600)
        yield pair

hh.HH.compare = slow_compare
"""


@pytest.mark.parametrize(
    "sent, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_killed_preparation_leaves_nothing_and_the_same_command_completes(
    sent, code, hh_files, tmp_path
):
    home = tmp_path / "out/hh/helpful_base"
    directories = ("--manual_dir", hh_files, "--data_dir", tmp_path / "out")
    with command(SLOW_COMPARE, "hh_helpful_base", *directories) as child:
        while child.poll() is None and not list(home.glob("incomplete.*")):
            time.sleep(0.01)
        with pytest.raises(UserError, match="another process is preparing"):
            prepare.prepare("hh_helpful_base", str(hh_files), str(tmp_path / "out"))
        child.send_signal(sent)
        errors = child.stderr.read()
    assert child.returncode == code and "Traceback" not in errors, errors
    assert prefs.report("hh_helpful_base", str(tmp_path / "out")) is None
    assert prepared("hh_helpful_base", hh_files, tmp_path / "out")[0]["train"]["pairs"] == 1
    assert [path.name for path in home.iterdir()] == ["1.0.0"]


INTERRUPT_WITHIN_A_DESTRUCTOR = """
import os, signal, time
from alignjax.data import prepare

class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)

def prepare_and_report(argv):
    Dying()
    print("dropped", flush=True)
    time.sleep(600)

prepare.prepare_and_report = prepare_and_report
prepare.run()
"""


def test_an_interrupt_that_python_drops_is_raised_again():
    """Python drops an exception within a destructor or a callback of the garbage collector."""
    child = subprocess.run(
        [sys.executable, "-c", INTERRUPT_WITHIN_A_DESTRUCTOR],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert child.stdout == "dropped\n"
    assert "nothing is half made" in child.stderr and "Traceback" not in child.stderr
    assert child.returncode == 130


# --------------------------------------------------------------------------------------- downloads


class Server(NamedTuple):
    url: str
    requested: list[str]  # paths
    answering: threading.Event  # while it is cleared, answers wait


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serve tmp_path on this machine."""
    requested = []
    answering = threading.Event()
    answering.set()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, form, *values):
            requested.append(self.path)
            answering.wait()

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=tmp_path))
    thread = threading.Thread(target=partial(served.serve_forever, 0.01))
    thread.start()
    yield Server(f"http://127.0.0.1:{served.server_port}/", requested, answering)
    answering.set()
    served.shutdown()
    thread.join()
    served.server_close()


def test_files_are_fetched_once_and_compared_with_the_published_checksum(
    hh_files, tmp_path, server, monkeypatch
):
    monkeypatch.setattr(hh, "GITHUB", {"helpful": server.url})
    sums = {}
    for name in ("helpful-base/train", "helpful-base/test"):
        sums[name] = hashlib.sha256((hh_files / f"{name}.jsonl.gz").read_bytes()).hexdigest()
    monkeypatch.setattr(hh, "SHA256", sums | {"helpful-base/test": "0" * 64})
    with pytest.raises(
        UserError,
        match=f"test.jsonl.gz: expected sha256 {'0' * 64}, downloaded {sums['helpful-base/test']}",
    ):
        prepare.prepare("hh_helpful_base", "", str(tmp_path / "out"))
    monkeypatch.setattr(hh, "SHA256", sums)
    splits, rows = prepared("hh_helpful_base", "", tmp_path / "out")
    assert splits["train"]["rows"] == 7 and rows["train"].keys() == {"helpful-base/train/1"}
    files = prefs.report("hh_helpful_base", str(tmp_path / "out"))["files"]
    assert files == {f"{name}.jsonl.gz": [digest, digest] for name, digest in sums.items()}
    prepared("hh_helpful_base:empty=keep", "", tmp_path / "out")
    assert Counter(server.requested) == {
        "/helpful-base/train.jsonl.gz": 1,
        "/helpful-base/test.jsonl.gz": 2,
    }


def test_a_failed_download_explains_how_to_do_it_by_hand(tmp_path, server, monkeypatch, capsys):
    monkeypatch.setattr(prm800k, "URL", f"{server.url}none/")
    assert prepare.main(["prm800k:phases=2", "--data_dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "prm800k: the download failed: Failed to get url" in error and "404" in error
    assert f"DIR/phase2_test.jsonl   from {server.url}none/phase2_test.jsonl" in error
    assert "Traceback" not in error
    monkeypatch.setattr(prm800k, "URL", "http://127.0.0.1:9/")
    assert prepare.main(["prm800k:phases=2", "--data_dir", str(tmp_path / "out")]) == 2
    assert "Connection refused" in capsys.readouterr().err


def test_an_interrupted_download_ends_at_once_and_leaves_nothing(hh_files, tmp_path, server):
    server.answering.clear()
    patch = f"hh.GITHUB = dict(helpful={server.url!r})"
    with command(patch, "hh_helpful_base", "--data_dir", tmp_path / "out") as child:
        while child.poll() is None and len(server.requested) < 2:
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        errors = child.stderr.read()
    assert child.returncode == 130 and "Traceback" not in errors, errors
    assert prefs.report("hh_helpful_base", str(tmp_path / "out")) is None
    prepare.prepare("hh_helpful_base", str(hh_files), str(tmp_path / "out"))
    assert list((tmp_path / "out/downloads/hh").iterdir()) == []


# -------------------------------------------------------------------------------- as training data


def test_a_public_set_gives_every_kind_of_example(hh_files, tmp_path):
    """Comparisons; distinct prompts; the chosen replies as conversations and as text.

    The held-out split is the set's test.
    """
    spec = "hh_helpful_base:empty=keep,same_role=keep"
    out = str(tmp_path / "out")
    prepare.prepare(spec, str(hh_files), out)
    options = sources.ReadOptions(data_dir=out)

    def load(kind, split="train"):
        return sources.load(f"tfds/{spec}", kind, split, options)

    comparisons = load("comparisons")
    prepared_rows = prefs.read(spec, "train", out)
    assert [row["chosen"] for row in comparisons] == [row["chosen"] for row in prepared_rows]
    # Two rows have the prompt "Hello".
    prompts = [row["prompt"][-1]["content"] for row in load("prompts")]
    assert sorted(prompts) == ["Hello", "Two"]
    for row, turns, text in zip(comparisons, load("conversations"), load("text"), strict=True):
        reply = {"role": "assistant", "content": row["chosen"]}
        assert turns["messages"] == [*row["prompt"], reply]
        assert text == {"text": "\n\n".join(m["content"] for m in turns["messages"])}
    assert len(load("comparisons", "heldout")) == 2
    prompts_of_test = sources.load(f"tfds/{spec}/test", "prompts", "train", options)
    assert prompts_of_test[0]["prompt"] == user("Hello")


def test_the_prompts_of_the_held_out_split_are_not_trained_on(hh_files, tmp_path):
    config = configs.Config()
    printed = []
    config.data.data_dir = str(tmp_path / "out")
    spec = "hh_helpful_base:empty=keep,same_role=keep"
    prepare.prepare(spec, str(hh_files), config.data.data_dir)
    source = f"tfds/{spec}"
    sets = mixture.sets(config, "comparisons", source, source, printed.append)
    assert {row["prompt"][-1]["content"] for row in sets.train[0]} == {"Two"}
    assert len(sets.heldout[source]) == 2
    assert printed == [f"tfds/{spec}: 2 of 3 comparisons dropped: their prompt is held out"]
