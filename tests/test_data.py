"""The embedded world, chat tokens, users' files and batches.

Hand-worked numbers, and what must agree or differ.
"""

import gzip
import json
import re
import threading
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from alignjax import config as configs
from alignjax.algorithms import intervals, lm, ranking
from alignjax.config import UserError
from alignjax.data import chat, encoding, files, mixture, packing, sources, toy
from alignjax.machine import sharding

USER = {"role": "user", "content": "last : red cat box"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat.train_tokenizer(toy.tokenizer_texts(0), tmp_path_factory.mktemp("tokenizer"), 1024)


@pytest.fixture(scope="module")
def conversations():
    return toy.examples("conversations", "heldout", 0)


@pytest.mark.parametrize(
    "prompt, response, score",
    [
        ("copy : red cat box", "sure , red cat box .", 1.0),
        ("copy : red cat box", "red cat box", 0.7),
        ("copy : red cat box", "um well i guess red cat box maybe", 0.7),
        ("copy : red cat box", "red cat box red cat box .", 0.7),
        ("copy : red cat box", "sure , red cat box red cat box .", 0.7),
        ("copy : red cat box", "sure , red box .", 0.7 * 2 / 3 + 0.3),  # one word dropped
        ("copy : red cat box", "sure , red cat cat box .", 0.7 * 2 / 3 + 0.3),  # one word doubled
        ("copy : red cat box", "what ? red sun hat !", 0.7 / 3),  # two words replaced
        ("find : amy cat . bob box . tom sun . bob", "sure , bob box .", 1.0),
        ("find : amy cat . bob box . tom sun . bob", "sure , bob sun .", 0.65),
        ("find : amy cat . bob box . tom sun . bob", "box", 0.35),
        ("find : amy cat . bob box . tom sun . bob", "tom sun", 0.0),
        ("last : red cat box", "sure , box .", 1.0),
        ("last : red cat box", "sure , red .", 0.3),
        ("last : red cat box", "sure , box . thanks", 0.0),  # a second word on an answer of one
        ("count : red cat box", "sure , three .", 1.0),
        ("join : red cat", "sure , red and cat .", 1.0),
        ("join : red cat", "red cat", 0.7 * 2 / 3),
        # "Sure" is no courtesy of this world: one insertion of three.
        ("join : red cat", "Sure, red and cat.", 0.7 * 2 / 3),
        ("write a poem", "sure , red .", 0.0),
    ],
)
def test_true_score_by_hand(prompt, response, score):
    assert toy.true_score(prompt, response) == pytest.approx(score, abs=1e-12)


@pytest.mark.parametrize(
    "prompt", ["last : amy cat box", "last : red cat box", "count : red cat", "x", ""]
)
def test_a_response_without_the_answer_has_a_low_score(prompt):
    """No trick scores above a wrong answer that is well put.

    All candidates listed, the prompt repeated, only courtesy, garbage.
    """
    listed = [
        " ".join(toy.NAMES + toy.THINGS + toy.NUMBERS),
        "cat box",
        "red cat box",
        "one two three",
        prompt,
    ]
    for words in [
        *listed,
        "",
        " ",
        "sure , .",
        "sure",
        "\n\0\ue000",
        "{}",
        ". . .",
        "猫",
        "sure , " * 500,
    ]:
        for response in (words, f"sure , {words} ."):
            assert toy.true_score(prompt, response) <= toy.FORM_WEIGHT


def test_only_the_ideal_scores_one_and_right_beats_wrong():
    rng = np.random.default_rng(0)
    for prompt in {toy.make_prompt(rng) for _ in range(2000)}:
        assert toy.true_score(prompt, toy.ideal(prompt)) == 1.0
        right = " ".join(toy.answer(prompt))
        wrong = " ".join(toy.corrupt(rng, prompt))
        for i, form in enumerate(toy.FORMS):
            score_of_right = toy.true_score(prompt, form.replace("{}", right))
            score_of_wrong = toy.true_score(prompt, form.replace("{}", wrong))
            assert score_of_wrong < score_of_right and (score_of_right == 1.0) == (i == 0)
            assert i == 0 or score_of_right == 0.7


def test_the_answer_listed_among_candidates_earns_no_rightness():
    prompt = "last : sun cat box"
    assert toy.true_score(prompt, "sure , sun cat box .") == 0.3
    assert toy.true_score(prompt, "cat box") == 0.0


def test_shares_of_the_conversations(conversations):
    rows = toy.examples("conversations", "train", 0)
    scores = np.array([toy.true_score(*(m["content"] for m in row["messages"])) for row in rows])
    mix = toy.DEMONSTRATED
    assert abs((scores == 1).mean() - mix.right_good) < 0.02
    assert abs((scores == 0.7).mean() - mix.right_bad) < 0.02
    assert len(rows) == 20000 and len(conversations) == 1000


def difference(row, grade):
    [prompt] = [message["content"] for message in row["prompt"]]
    return grade(prompt, row["chosen"]) - grade(prompt, row["rejected"])


def test_clean_comparisons_agree_with_the_true_score_and_noisy_ones_with_rightness():
    for name, settings in toy.COMPARISONS.items():
        grade = toy.true_score if settings.form_counts else toy.rightness
        for split in ("train", "heldout"):
            rows = toy.examples(name, split, 0)
            gap = np.array([difference(row, grade) for row in rows])
            np.testing.assert_allclose(np.abs(gap), [row["margin"] for row in rows])
            assert abs((gap < 0).mean() - settings.flipped) < (0.04 if settings.flipped else 1e-9)
            assert np.abs(gap).min() >= (settings.difference or 1e-9)


def prompts_in(row):
    """Return the prompt of an example, or the prompts in a document of the world."""
    messages = row.get("prompt") or row.get("messages")
    if messages:
        return [messages[0]["content"]]
    starts = [line.split(" = ")[0] for line in row["text"].split("\n")]
    return [start for start in starts if start.split(" : ")[0] in toy.TASKS]


def test_the_splits_share_no_prompt_and_no_english():
    seen = {"train": set(), "heldout": set()}
    for name in toy.SIZES:
        for split, prompts in seen.items():
            for row in toy.examples(name, split, 0):
                prompts.update(prompts_in(row))
    assert min(map(len, seen.values())) > 1000 and not seen["train"] & seen["heldout"]
    assert not set(toy.english("train")) & set(toy.english("heldout"))


def test_examples_follow_the_seed():
    for name in ("conversations", "comparisons-clean", "prompts"):
        examples = toy.examples(name, "heldout", 3)
        assert toy.examples(name, "heldout", 3) == examples
        assert toy.examples(name, "heldout", 4) != examples
    assert toy.examples("prompts", "heldout", 0)[0] == {
        "prompt": [{"role": "user", "content": "last : red leg"}]
    }
    with pytest.raises(UserError, match="did you mean 'conversations'"):
        toy.examples("conversation", "train", 0)
    with pytest.raises(
        UserError, match="takes comparisons, that is toy/comparisons-noisy or toy/comparisons-clean"
    ):
        sources.load("toy/prompts", "comparisons", "train")


def test_the_tokenizer_is_the_same_each_time_and_has_every_word(tokenizer, tmp_path):
    again = chat.train_tokenizer(toy.tokenizer_texts(0), tmp_path, 1024)
    assert again.get_vocab() == tokenizer.get_vocab() and len(tokenizer) == 1024
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    for word in (*toy.NAMES, *toy.THINGS, *toy.NUMBERS, *toy.TASKS, *toy.COURTESY):
        assert len(tokenizer(word)["input_ids"]) == len(tokenizer(" " + word)["input_ids"]) == 1
    assert tokenizer.convert_tokens_to_ids(chat.END) == chat.end_token(tokenizer)
    assert tokenizer.convert_tokens_to_ids(chat.PAD) == tokenizer.pad_token_id
    with pytest.raises(UserError, match="no tokenizer there"):
        chat.load_tokenizer(tmp_path / "absent")


def turns(*contents):
    """Return messages with these contents, of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def trained_text(tokenizer, conversation):
    """Decode the tokens of a conversation that are trained on."""
    pairs = zip(conversation.tokens, conversation.trained, strict=True)
    return tokenizer.decode([token for token, is_trained in pairs if is_trained])


@pytest.mark.parametrize(
    "messages",
    [
        turns("copy : red cat", "sure , red cat ."),
        turns("first : a b", " well\n\n", "last : a b", "sure , b ."),
        [
            {"role": "system", "content": "assistant\nbe kind"},
            *turns("a", "", "c", "naïve 猫 <b>", "and then ?"),
        ],
    ],
)
def test_only_the_assistants_turns_are_trained_on(tokenizer, messages):
    [conversation] = chat.encode_conversations(tokenizer, [messages])
    tokens, trained = conversation
    replies = [m["content"] + chat.END for m in messages if m["role"] == "assistant"]
    assert trained_text(tokenizer, conversation) == "".join(replies)
    assert sum(np.diff([0, *trained]) == 1) == len(replies)  # so many runs of trained tokens
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert whole.startswith(tokenizer.decode(tokens)) and trained[-1] == 1


def test_the_mask_agrees_with_the_templates_generation_marks(tokenizer, conversations):
    rows = [row["messages"] for row in conversations[:200]]
    theirs = tokenizer.apply_chat_template(
        rows, return_dict=True, return_assistant_tokens_mask=True
    )
    for (tokens, trained), ids, mask in zip(
        chat.encode_conversations(tokenizer, rows),
        theirs["input_ids"],
        theirs["assistant_masks"],
        strict=True,
    ):
        assert tokens == ids[: len(tokens)]
        assert trained == mask[: len(tokens)]
        assert not any(mask[len(tokens) :])


def test_a_template_must_end_the_turns_of_the_assistant(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    other = chat.load_tokenizer(tmp_path)
    other.chat_template = (
        "{% for m in messages %}"
        "{{ m['role'] + ': ' + m['content'] | trim + '<|endoftext|>' }}"
        "{% endfor %}"
    )
    [conversation] = chat.encode_conversations(other, [turns("copy : red", "red")])
    assert chat.end_token(other) == other.pad_token_id != other.eos_token_id
    # The template's prompts do not begin the assistant's turn, so the model learns to.
    assert trained_text(other, conversation) == "assistant: red<|endoftext|>"
    other = chat.load_tokenizer(tmp_path)
    other.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(UserError, match="no special token ends"):
        chat.encode_conversations(other, [turns("copy : red", "red")])


def test_training_and_scoring_share_one_tokenisation(tokenizer):
    """A comparison, a conversation, and a prompt followed by a response have the same ids.

    Also where words meet the edge of a line.
    """
    rows = toy.examples("comparisons-clean", "heldout", 0)[:100]
    rows.append(
        {"prompt": turns("a", "b", "c"), "chosen": "\n sure", "rejected": "", "margin": 0.5}
    )
    arrays, dropped = encoding.encode_comparisons(tokenizer, rows, 48)
    assert dropped == 0 and arrays["margin"][-1] == 0.5
    for i, row in enumerate(rows):
        [prompt] = chat.encode_prompts(tokenizer, [row["prompt"]])
        [comparison] = chat.encode_comparisons(tokenizer, [row])
        for side in ("chosen", "rejected"):
            tokens = getattr(comparison, side)
            [response] = chat.encode_responses(tokenizer, [row["prompt"]], [row[side]])
            length = arrays[f"{side}_length"][i]
            assert response[-1] == chat.end_token(tokenizer)
            assert tokens == prompt + response == arrays[side][i][:length].tolist()
            messages = row["prompt"] + turns("", row[side])[1:]
            [conversation] = chat.encode_conversations(tokenizer, [messages])
            assert tokens == conversation.tokens
            assert not arrays[side][i][length:].any()
            assert chat.decode_response(tokenizer, response) == row[side]


def test_text_windows_by_hand(tokenizer):
    """Windows of 4 over "cat box sun|hat cup|dog", where | is the pad token.

    The first token of a document is no target.
    """
    rows = [{"text": t} for t in ("cat box sun", "hat cup", "dog map")]
    words = ("cat", " box", " sun", "hat", " cup", "dog")
    cat, box, sun, hat, cup, dog = (tokenizer(word)["input_ids"][0] for word in words)
    end = tokenizer.pad_token_id
    arrays, dropped = encoding.encode_text(tokenizer, rows, 4)
    assert dropped == 0
    assert arrays["tokens"].tolist() == [[cat, box, sun, end], [hat, cup, end, dog]]
    assert arrays["segments"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 2]]
    assert arrays["mask"].tolist() == [[0, 1, 1, 1], [0, 1, 1, 0]]
    with pytest.raises(UserError, match="data.max_length=64: the text has only 10 tokens"):
        encoding.encode_text(tokenizer, rows, 64)


def test_prompts_are_padded_in_front_and_dropped_if_too_long(tokenizer):
    rows = [{"prompt": turns("copy : " + "cat " * n)} for n in (9, 1, 2)]
    ids = chat.encode_prompts(tokenizer, [row["prompt"] for row in rows])
    for limit, kept in ((len(ids[0]), [0, 1, 2]), (len(ids[2]), [1, 2])):
        arrays, dropped = encoding.encode_prompts(tokenizer, rows, limit)
        assert dropped == 3 - len(kept) and arrays["index"].tolist() == kept
        assert arrays["lengths"].tolist() == [len(ids[i]) for i in kept]
        assert arrays["prompts"][:].tolist() == [[0] * (limit - len(ids[i])) + ids[i] for i in kept]
    with pytest.raises(
        UserError,
        match=f"max_length=3: all 3 prompts are longer, the shortest has {len(ids[1])} tokens",
    ):
        encoding.encode_prompts(tokenizer, rows, 3)


def test_a_ragged_behaves_as_the_padded_array():
    sequences = [[1, 2, 3], [], [4], [5, 6]]
    for left in (False, True):
        ragged = encoding.Ragged(sequences, 4, left)
        whole = encoding.pad(sequences, 4, left)
        mask = np.array([True, False, False, True])
        for rows in (2, slice(1, 3), np.array([3, 0, 0]), [1], slice(None), mask):
            assert ragged[rows].tolist() == whole[rows].tolist()
            assert ragged[rows].dtype == np.int32
        assert len(ragged) == 4 and np.asarray(ragged).tolist() == whole.tolist()
        part = {"x": ragged, "n": np.arange(4)}
        joined = encoding.join([part, part])
        assert joined["x"][:].tolist() == whole.tolist() * 2
        assert joined["n"].tolist() == [0, 1, 2, 3] * 2


def test_a_conversation_over_the_limit_is_dropped_and_never_cut(tokenizer):
    rows = [{"messages": turns("last : cat", "sure , cat .")}, {"messages": turns("a", "b " * 50)}]
    arrays, dropped = encoding.encode_conversations(tokenizer, rows, 24)
    [(tokens, trained)] = chat.encode_conversations(tokenizer, [rows[0]["messages"]])
    n = len(tokens)
    assert dropped == 1 and arrays["tokens"][0].tolist() == tokens + [0] * (24 - n)
    assert arrays["mask"][0].tolist() == trained + [0] * (24 - n)
    assert arrays["segments"][0].tolist() == [1] * n + [0] * (24 - n)


def test_batches_visit_each_row_once_an_epoch():
    rows = {"x": np.arange(24), "y": np.arange(24) * 2}
    batches = mixture.Batches(rows, 8, seed=1)
    steps = [batches.get(step) for step in range(6)]
    epochs = [np.concatenate([batch["x"] for batch in steps[i : i + 3]]) for i in (0, 3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs)
    assert list(epochs[0]) != list(epochs[1]) and list(epochs[0]) != list(range(24))
    assert all((batch["y"] == 2 * batch["x"]).all() for batch in steps)
    again = mixture.Batches(rows, 8, seed=1)
    for step in (5, 0, 3):  # in any order: a batch depends on its step alone
        assert (again.get(step)["x"] == steps[step]["x"]).all()
    assert (mixture.Batches(rows, 8, seed=2).get(0)["x"] != steps[0]["x"]).any()


def test_batches_do_not_depend_on_the_processes(monkeypatch):
    """Each process has all of a batch; `sharding.shard_batch` gives a device its part."""
    rows = {"x": np.arange(50)}
    steps = (0, 6, 13)  # one of them crosses the end of an epoch
    expected = [mixture.Batches(rows, 7, 5).get(step)["x"] for step in steps]
    monkeypatch.setattr("jax.process_index", lambda: 1)
    monkeypatch.setattr("jax.process_count", lambda: 3)
    for step, order in zip(steps, expected, strict=True):
        assert len(order) == 7 and (mixture.Batches(rows, 7, 5).get(step)["x"] == order).all()
    [batch] = mixture.in_order({"x": np.arange(3)}, 3)
    assert batch["x"].tolist() == [0, 1, 2]


def test_in_order_every_row_comes_once():
    rows = {"x": np.arange(5), "y": np.arange(10).reshape(5, 2)}
    assert [batch["x"].tolist() for batch in mixture.in_order(rows, 3)] == [[0, 1, 2], [3, 4]]
    parts = [batch["y"] for batch in mixture.in_order(rows, 2)]
    assert np.concatenate(parts).tolist() == rows["y"].tolist()


def test_ahead_returns_what_each_step_needs():
    """Whatever the order of the steps.

    The next step is begun before it is fetched, and an error is raised when its step is fetched.
    """
    made = []
    begun = threading.Event()

    def make(step):
        made.append(step)
        if step == 1:
            begun.set()
        if step == 9:
            raise UserError("row 9")
        return [step]

    ahead = mixture.Ahead(make)
    assert ahead.get(0) == [0] and begun.wait()
    assert [ahead.get(step) for step in (1, 2, 7, 3, 8)] == [[1], [2], [7], [3], [8]]
    assert made.count(1) == made.count(2) == 1
    with pytest.raises(UserError, match="row 9"):
        ahead.get(9)


# What the stages return from packed microbatches; test_packing.py has the packing itself.


def random_lengths(seed, n, longest):
    return np.random.default_rng(seed).integers(1, longest + 1, n)


def conversations_of(seed, n=12, longest=20):
    """Return rows of tokens that are all different, in one or two segments.

    The latter half of each row is trained on.
    """
    lengths = random_lengths(seed, n, longest)
    place = np.arange(longest)
    real = place < lengths[:, None]
    segments = np.where(real, 1 + (place >= lengths[:, None] // 3), 0)
    tokens = np.where(real, 100 * (1 + np.arange(n)[:, None]) + place, 0)
    return {
        "tokens": tokens,
        "mask": (real & (place >= lengths[:, None] // 2)).astype(np.int32),
        "segments": segments,
    }


def comparisons_of(seed, n=9, longest=12):
    """Return pairs of responses whose tokens are 1000 x (1 + pair) + 100 x side + place."""
    lengths = random_lengths(seed, 2 * n, longest).reshape(n, 2)
    rows = {"margin": np.arange(n).astype(np.float32)}
    for i, side in enumerate(("chosen", "rejected")):
        tokens = 1000 * (1 + np.arange(n)[:, None]) + 100 * i + np.arange(longest)
        rows[side] = np.where(np.arange(longest) < lengths[:, i : i + 1], tokens, 0)
        rows[f"{side}_length"] = lengths[:, i]
    return rows


def by_last_token(params, part):
    """Return the last tokens themselves as scores."""
    return part.packed.tokens.reshape(-1)[part.ends]


ONE_DEVICE = sharding.make_mesh(configs.Mesh(fsdp=1), jax.devices()[:1])


@pytest.mark.parametrize("budget", [1, 48, 4096])
def test_scores_come_back_in_the_rows_order_and_every_row_counts_once(budget, monkeypatch):
    """In nine pairs in batches of four, accuracy and ties are exact ninths.

    A mean score is that of all demonstrations.
    """
    monkeypatch.setattr(sharding, "shard_batch", lambda batch, mesh: batch)
    rows = comparisons_of(3)
    n = 9
    lengths = np.stack([rows["chosen_length"], rows["rejected_length"]], axis=1)
    last_tokens = 1000 * (1 + np.arange(n)[:, None]) + 100 * np.arange(2) + lengths - 1
    assert (
        ranking.score_rows(by_last_token, {}, rows, budget, ONE_DEVICE).tolist()
        == last_tokens.tolist()
    )

    def by_length(params, part):
        return (by_last_token(params, part) % 100).astype(np.float32)

    figures = ranking.heldout_figures(by_length, {}, rows, 4, budget, ONE_DEVICE)
    longer = (lengths[:, 0] > lengths[:, 1]).sum()
    same = (lengths[:, 0] == lengths[:, 1]).sum()
    loss = np.log(1 + np.exp(lengths[:, 1] - lengths[:, 0])).mean()
    low, high = intervals.wilson_interval(int(longer), n)
    assert figures == {
        "accuracy": longer / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "ties": same / n,
        "loss": pytest.approx(loss),
        "comparisons": n,
    }
    demonstrations = conversations_of(4, n=9)
    sizes = (demonstrations["segments"] > 0).sum(axis=1)
    mean = ranking.mean_score(by_length, {}, demonstrations, 4, budget, ONE_DEVICE)
    assert mean == pytest.approx((sizes - 1).mean())


@pytest.mark.parametrize("budget", [1, 48, 4096])
def test_the_held_out_loss_is_the_mean_of_all_targets(budget, monkeypatch):
    """Even if batches have different numbers of them; here a target's loss is its token mod 100."""
    monkeypatch.setattr(sharding, "shard_batch", lambda batch, mesh: batch)

    def loss(params, part):
        tokens = packing.at_targets(part.packed.tokens, part.targets)
        loss = (part.weights * (tokens % 100)).sum()
        return loss, {"loss": loss}

    rows = conversations_of(5, n=11)
    targets = rows["tokens"][(rows["mask"] > 0) & (np.arange(20) > 0)] % 100
    assert lm.heldout_loss(loss, {}, rows, 4, budget, ONE_DEVICE) == pytest.approx(targets.mean())


def test_files_give_the_same_examples_as_the_world(tmp_path):
    row = {"prompt": "hi", "chosen": "a", "rejected": "b", "note": 1}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n\n")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(json.dumps({**row, "prompt": turns("x", "y", "z"), "margin": 2}))
    assert sources.load(str(tmp_path / "*.jsonl*"), "comparisons", "train") == [
        {
            "prompt": turns("hi"),
            "chosen": "a",
            "rejected": "b",
            "margin": 0.0,
            "where": f"{tmp_path}/a.jsonl:1",
        },
        {
            "prompt": turns("x", "y", "z"),
            "chosen": "a",
            "rejected": "b",
            "margin": 2.0,
            "where": f"{tmp_path}/b.jsonl.gz:1",
        },
    ]


@pytest.mark.parametrize(
    "kind, line, message",
    [
        ("text", '{"text": "a"', "not JSON"),
        ("text", '["a"]', r'expected an object, found list: \["a"\]'),
        ("text", '{"test": "a"}', "a row of text needs a field 'text'; did you mean 'test'"),
        ("text", '{"text": 3}', "text: expected text, found int: 3"),
        (
            "prompts",
            '{"prompt": []}',
            r"prompt: expected text or a list of messages, found list: \[\]",
        ),
        (
            "prompts",
            '{"prompt": [{"role": "user"}]}',
            r"prompt\[0\]: expected an object with content as text, found dict",
        ),
        (
            "conversations",
            '{"messages": "a"}',
            'messages: expected a list of messages, found str: "a"',
        ),
        (
            "conversations",
            '{"messages": [{"role": "user", "content": "a"}]}',
            "role assistant, found the roles user",
        ),
        (
            "comparisons",
            '{"prompt": "a", "chosen": "b"}',
            "a row of comparisons needs a field 'rejected'",
        ),
        (
            "comparisons",
            '{"prompt": "a", "chosen": "b", "rejected": null}',
            "rejected: expected text or a list of messages, found NoneType",
        ),
        (
            "comparisons",
            '{"chosen": "b", "rejected": "c"}',
            "comparisons without a prompt need whole conversations",
        ),
        (
            "comparisons",
            '{"prompt": "a", "chosen": [{"role": "user", "content": "a"}], "rejected": "c"}',
            "chosen: expected one message with the role assistant after the prompt, "
            "found the roles user",
        ),
        (
            "comparisons",
            json.dumps({"chosen": turns("a", "b"), "rejected": turns("x", "c")}),
            "the conversations differ",
        ),
        (
            "comparisons",
            '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": "1"}',
            'margin: expected a number, found str: "1"',
        ),
        (
            "comparisons",
            '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}',
            "margin: expected a number, found float",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, kind, line, message):
    good = {"text": "a", "prompt": "a", "messages": turns("a", "b"), "chosen": "b", "rejected": "c"}
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}"):
        files.read(path, kind)


def test_comparisons_come_in_every_form(tmp_path):
    """Prompt and replies are text or messages; the replies may repeat the prompt, or imply it."""
    system = {"role": "system", "content": "be kind"}
    replies = {"chosen": "b", "rejected": "c", "margin": 0.0}
    forms = [  # (row, its prompt)
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, turns("a")),
        (
            {"prompt": [system, *turns("a")], "chosen": turns("", "b")[1:], "rejected": "c"},
            [system, *turns("a")],
        ),
        ({"prompt": "a", "chosen": turns("a", "b"), "rejected": turns("a", "c")}, turns("a")),
        (
            {"chosen": turns("x", "y", "a", "b"), "rejected": turns("x", "y", "a", "c")},
            turns("x", "y", "a"),
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            turns("a"),
        ),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(value) for value, _ in forms))
    rows = files.read(tmp_path / "rows.jsonl", "comparisons")
    for i, (row, (_, prompt)) in enumerate(zip(rows, forms, strict=True), 1):
        assert row == replies | {"prompt": prompt, "where": f"{tmp_path}/rows.jsonl:{i}"}


def test_parquet_is_read_as_lines_are(tmp_path):
    values = [
        {"prompt": "a", "chosen": turns("a", "b"), "rejected": turns("a", "c"), "margin": None},
        {"prompt": "d", "chosen": turns("d", "e"), "rejected": turns("x", "c"), "margin": 1.5},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "rows.parquet")
    [row] = files.read(tmp_path / "rows.parquet", "comparisons", skip=True, say=lambda text: None)
    assert (row["prompt"], row["margin"]) == (turns("a"), 0.0)
    assert row["where"] == f"{tmp_path}/rows.parquet: row 1"
    with pytest.raises(
        UserError,
        match="rows.parquet: row 2: rejected: expected one message with the role assistant",
    ):
        files.read(tmp_path / "rows.parquet", "comparisons")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match="torn.parquet: expected Parquet"):
        files.read(tmp_path / "torn.parquet", "comparisons")


def test_bad_rows_are_skipped_and_counted_on_demand(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": 3}\n{"tex": "b"}\n{"text": "c"}\n')
    printed = []
    rows = files.read(tmp_path / "a.jsonl", "text", skip=True, say=printed.append)
    assert [row["text"] for row in rows] == ["a", "c"]
    [line] = printed
    assert re.search(
        r"a.jsonl: 2 bad rows skipped of 4; the first: .*a.jsonl:2: text: expected text, "
        "found int: 3",
        line,
    )
    with pytest.raises(
        UserError, match=r'a.jsonl:2: text: .*; data.on_bad_row="skip" leaves such rows out'
    ):
        files.read(tmp_path / "a.jsonl", "text")


def test_prompts_keep_their_other_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "2 + 2", "answer": "4", "level": 1}\n')
    assert files.read(tmp_path / "a.jsonl", "prompts")[0]["columns"] == {"answer": "4", "level": 1}


def test_sources_and_their_weights():
    assert sources.parse("") == []
    assert sources.parse("a*.jsonl, b") == [("a*.jsonl", None), ("b", None)]
    spec = "0.7*tfds/shp:min_score_ratio=3,pairs_per_post=5/test,.3*mine.jsonl"
    assert sources.parse(spec) == [
        ("tfds/shp:min_score_ratio=3,pairs_per_post=5/test", 0.7),
        ("mine.jsonl", 0.3),
    ]
    for wrong in ("a,,b", "0*a", "2*a,b"):
        with pytest.raises(UserError, match="WEIGHT"):
            sources.parse(wrong)


def test_weights_are_the_shares_of_the_sources():
    """Examples are drawn 3 to 1 whatever the sizes, each source in epochs of its own.

    The draw is the same for the same seed.
    """
    rows = {"x": np.arange(12)}
    batches = mixture.Batches(rows, 8, 1, sizes=[4, 8], weights=[3.0, 1.0])
    drawn = np.concatenate([batches.get(i)["x"] for i in range(8)])
    first = drawn[drawn < 4]
    second = drawn[drawn >= 4]
    assert len(first) == 48 and len(second) == 16
    assert (np.bincount(first) == 12).all() and (np.bincount(second)[4:] == 2).all()
    again = mixture.Batches(rows, 8, 1, sizes=[4, 8], weights=[3.0, 1.0])
    assert (again.get(5)["x"] == batches.get(5)["x"]).all() and batches.epoch == 2


def write_comparisons(path, prompts):
    rows = [
        {"prompt": prompt, "chosen": f"yes {i}", "rejected": "no"}
        for i, prompt in enumerate(prompts)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_no_prompt_is_trained_on_and_held_out(tmp_path):
    """Prompts that another file holds out are dropped; a file in both is split by its prompts."""
    config = configs.Config()
    printed = []
    a = write_comparisons(tmp_path / "a.jsonl", [f"p{i % 100}" for i in range(300)])
    b = write_comparisons(tmp_path / "b.jsonl", ["p7", " p8 ", "new"])
    train = f"2*{a},1*toy/comparisons-clean"
    sets = mixture.sets(config, "comparisons", train, b, printed.append)
    assert [len(rows) for rows in sets.train] == [294, 2000] and sets.weights == [2.0, 1.0]
    assert printed == [f"{a}: 6 of 300 comparisons dropped: their prompt is held out"]
    with pytest.raises(
        UserError, match="a.jsonl is to be trained on and held out: .* data.heldout_share"
    ):
        mixture.sets(config, "comparisons", a, a, printed.append)
    config.data.heldout_share = 0.2
    sets = mixture.sets(config, "comparisons", a, a, printed.append)
    trained = {sources.prompt_of(row) for row in sets.train[0]}
    held_out = {sources.prompt_of(row) for row in sets.heldout[a]}
    assert not trained & held_out and len(trained | held_out) == 100
    assert 10 < len(held_out) < 30 and len(printed) == 1
    assert len(sets.train[0]) == 3 * len(trained)
    assert len(sets.heldout[a]) == 3 * len(held_out)
    # Fewer are evaluated, but no more are trained on.
    config.data.heldout_examples = 5
    shorter = mixture.sets(config, "comparisons", a, a, printed.append)
    assert shorter.train == sets.train and shorter.heldout[a] == sets.heldout[a][:5]
    c = write_comparisons(tmp_path / "c.jsonl", ["p7", "p8", "new"])
    with pytest.raises(UserError, match="every prompt of it is held out"):
        mixture.sets(config, "comparisons", b, c, printed.append)


def test_the_index_of_a_prompt_counts_the_rows_of_all_sources(tokenizer):
    config = configs.Config()

    def prompt(words):
        return {"prompt": turns("copy : " + "cat " * words)}

    rows = [[prompt(1), prompt(60), prompt(2)], [prompt(3), prompt(4)]]
    sets = mixture.Sets(rows, None, {})
    batches = mixture.batches(config, sets, "prompts", 30, 2, tokenizer, lambda text: None)
    assert batches.rows["index"].tolist() == [0, 2, 3, 4]
    assert len(batches.rows["prompts"]) == 4


def test_chatml_can_be_used_instead_of_the_tokenizers_template(tokenizer, tmp_path):
    bare = chat.load_tokenizer(Path(tokenizer.name_or_path))
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no chat template"):
        chat.encode_prompts(chat.load_tokenizer(tmp_path / "bare"), [turns("a")])
    chatml = chat.load_tokenizer(tmp_path / "bare", "chatml")
    conversation = [turns("a", "b")]
    expected = chat.encode_conversations(tokenizer, conversation)
    assert chat.encode_conversations(chatml, conversation) == expected
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(
        tmp_path / "words"
    )
    with pytest.raises(UserError, match=r"<\|im_start\|>, <\|im_end\|> is no token of"):
        chat.load_tokenizer(tmp_path / "words", "chatml")
    settings = json.loads((tmp_path / "bare" / "tokenizer_config.json").read_text())
    settings |= {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (tmp_path / "bare" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="can't load this tokenizer"):
        chat.load_tokenizer(tmp_path / "bare")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}\n')
    for name, message in (
        ("none.jsonl", "no such file"),
        ("empty.jsonl", "empty"),
        ("plain.jsonl.gz", "JSON lines"),
        ("latin.jsonl", "UTF-8"),
    ):
        with pytest.raises(UserError, match=f"{name}.*{message}"):
            files.read(tmp_path / name, "text")
