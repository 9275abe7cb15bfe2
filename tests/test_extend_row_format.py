"""A config file outside the package registers a row format, and its rows are read like others."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from alignjax import config as configs
from alignjax.config import UserError
from alignjax.data import formats, mixture, sources

RATED_RM = '''
"""A reward model from rated responses."""

from alignjax import config as configs
from alignjax.config import UserError
from alignjax.data.formats import row_format


@row_format("comparisons", "instruction", "responses", "ratings")
def best_and_worst(row):
    rated = sorted(zip(row["ratings"], row["responses"], strict=True))
    lowest, worst = rated[0]
    highest, best = rated[-1]
    if lowest == highest:
        raise UserError(f"ratings: expected two that differ, found {row['ratings']}")
    return {
        "prompt": row["instruction"],
        "chosen": best,
        "rejected": worst,
        "margin": highest - lowest,
    }


def config(variant):
    c = configs.load("rm.py")
    c.data.train = "rated.jsonl"
    c.data.heldout = "rated.jsonl"
    c.data.heldout_share = 0.3
    return c
'''


def rated(number: int) -> dict:
    return {
        "instruction": f"question {number}",
        "responses": ["poor", f"good {number}", "fair"],
        "ratings": [1, 4.5, 3],
    }


@pytest.fixture(autouse=True)
def restored_formats(monkeypatch):
    """Keep what a test registers from the other tests."""
    monkeypatch.setattr(formats, "FORMATS", list(formats.FORMATS))


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A user's working directory, with a config file and rows of her own."""
    (tmp_path / "rated_rm.py").write_text(RATED_RM)
    write(tmp_path / "rated.jsonl", [rated(number) for number in range(20)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def quiet(text):
    raise AssertionError(f"nothing should be printed, not: {text}")


def test_the_format_of_a_config_file_reads_its_data(directory):
    config = configs.load("rated_rm.py")
    found = mixture.sets(config, "comparisons", config.data.train, config.data.heldout, quiet)
    [train] = found.train
    heldout = found.heldout["rated.jsonl"]
    assert len(train) + len(heldout) == 20 and len(heldout) > 0
    numbers = {row["where"]: int(row["where"].partition(":")[2]) - 1 for row in train + heldout}
    for row in train + heldout:
        number = numbers[row["where"]]
        assert row == {
            "where": f"rated.jsonl:{number + 1}",
            "prompt": [{"role": "user", "content": f"question {number}"}],
            "chosen": f"good {number}",
            "rejected": "poor",
            "margin": 3.5,
        }


def test_without_the_config_file_the_rows_are_no_comparisons(directory):
    with pytest.raises(
        UserError, match="rated.jsonl:1: a row of comparisons needs a field 'chosen'"
    ):
        sources.load("rated.jsonl", "comparisons", "train")


def test_a_file_may_mix_built_in_rows_with_those_of_a_new_format(directory):
    built_in = {"prompt": "a", "chosen": "b", "rejected": "c"}
    write(directory / "mixed.jsonl", [built_in, rated(7), built_in | rated(8)])
    configs.load("rated_rm.py")
    rows = sources.load("mixed.jsonl", "comparisons", "train")
    # Both formats take the third row: they have three fields each, and the last registered wins.
    assert [row["chosen"] for row in rows] == ["b", "good 7", "good 8"]


def test_parquet_rows_are_read_by_the_same_format(directory):
    table = pyarrow.Table.from_pylist([rated(3)])
    pyarrow.parquet.write_table(table, directory / "rated.parquet")
    configs.load("rated_rm.py")
    [row] = sources.load("rated.parquet", "comparisons", "train")
    assert (row["chosen"], row["where"]) == ("good 3", "rated.parquet: row 1")


def test_a_bad_row_of_a_new_format_is_named_or_skipped(directory):
    same = {"instruction": "a", "responses": ["b", "c"], "ratings": [2, 2]}
    write(directory / "rated.jsonl", [rated(1), same])
    configs.load("rated_rm.py")
    with pytest.raises(
        UserError, match=r"rated.jsonl:2: ratings: expected two that differ, found \[2, 2\]"
    ):
        sources.load("rated.jsonl", "comparisons", "train")
    printed = []
    options = sources.ReadOptions(skip_bad_rows=True, say=printed.append)
    rows = sources.load("rated.jsonl", "comparisons", "train", options)
    assert len(rows) == 1 and "1 bad rows skipped of 2" in printed[0]


def test_loading_a_config_file_twice_registers_its_format_once(directory):
    before = len(formats.FORMATS)
    configs.load("rated_rm.py")
    configs.load("rated_rm.py")
    assert len(formats.FORMATS) == before + 1


def test_a_reader_that_returns_no_example_is_a_user_error_that_names_the_field(directory):
    formats.row_format("comparisons", "instruction", "responses")(lambda row: {"prompt": "a"})
    with pytest.raises(UserError, match="rated.jsonl:1: chosen: expected text, found NoneType"):
        sources.load("rated.jsonl", "comparisons", "train")


def test_an_exception_of_a_reader_names_the_row(directory):
    formats.row_format("comparisons", "instruction")(lambda row: {"prompt": row["question"]})
    with pytest.raises(KeyError) as caught:
        sources.load("rated.jsonl", "comparisons", "train")
    assert caught.value.__notes__ == ["while a row format read rated.jsonl:1"]


def test_a_format_may_have_a_condition(directory):
    formats.row_format("text", "body", condition=lambda row: row["language"] == "en")(
        lambda row: {"text": row["body"]}
    )
    write(directory / "pages.jsonl", [{"body": "hello", "language": "en"}])
    assert sources.load("pages.jsonl", "text", "train")[0]["text"] == "hello"
    write(directory / "pages.jsonl", [{"body": "bonjour", "language": "fr"}])
    with pytest.raises(
        UserError,
        match="pages.jsonl:1: text: no row format takes a row with the fields body, language",
    ):
        sources.load("pages.jsonl", "text", "train")


def test_an_unknown_kind_is_a_user_error():
    with pytest.raises(UserError, match="no such kind; did you mean 'comparisons'"):
        formats.row_format("comparison", "a")
