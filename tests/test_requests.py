"""Answers to an evaluation's requests against those to one sequence at a time."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_models import tiny

from alignjax.config import Mesh, UserError
from alignjax.data import chat
from alignjax.evals import stops
from alignjax.evals.families import Family, group_families, shared_length
from alignjax.evals.requests import Requests, ResponseSettings
from alignjax.inference import LoadedModel, group_by_length, round_up
from alignjax.machine import sharding
from alignjax.models import transformer

WORDS = "the cat sat on a mat and ate its rat .\n\nQ: stop here now Question".split(" ")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return chat.train_tokenizer([" ".join(WORDS)] * 9, tmp_path_factory.mktemp("tokenizer"), 300)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny(vocab_size=304, max_length=96)


@pytest.fixture(scope="module", params=[1, 8])
def requests(model, tokenizer, request):
    """Return the answerer of requests, with so few tokens and slots that families pay off."""
    mesh = sharding.make_mesh(Mesh(), jax.devices()[: request.param])
    params = jax.device_put(model[1], sharding.param_shardings(model[1], mesh))
    loaded = LoadedModel(model[0], params, tokenizer, mesh, [tokenizer.eos_token_id])
    return Requests(loaded, tokens=128, slots=4)


@functools.cache
def forward(model):
    @jax.jit
    def logits(params, tokens, length):
        places = jnp.arange(len(tokens))
        real = (places < length)[None].astype(jnp.int32)
        hidden = transformer.apply(model, params, tokens[None], places[None], real).hidden
        return jax.nn.log_softmax(transformer.logits(model, params, hidden[0]))

    return logits


def logits_of(model, sequence):
    """Return log p [tokens vocabulary] after each token of a sequence, alone in its row."""
    model, params = model
    row = np.zeros(model.max_length, np.int32)
    row[: len(sequence)] = sequence
    return np.asarray(forward(model)(params, row, len(sequence)))[: len(sequence)]


def likelihood_pairs():
    """Return (context, continuation) pairs in random order.

    There are two families, with continuations of one token and of several after the same
    contexts, one pair alone, and two that are too long.
    """
    rng = np.random.default_rng(0)

    def draw(count):
        return rng.integers(3, 300, count).tolist()

    pairs = []
    for shots in (draw(35), draw(52)):
        for _ in range(8):
            context = shots + draw(rng.integers(3, 15))
            pairs += [(context, draw(1)), (context, draw(1)), (context, draw(3))]
    pairs += [([7], [8, 9]), (draw(5), draw(20)), (draw(90), draw(20)), (draw(3), draw(120))]
    return [pairs[number] for number in rng.permutation(len(pairs))]


def test_loglikelihoods_are_those_of_each_sequence_alone(requests, model):
    pairs = likelihood_pairs()
    greedy = logits_of(model, pairs[0][0])[-1].argmax()
    pairs.append((pairs[0][0], [int(greedy)]))
    answers = list(requests.loglikelihoods(pairs))
    likelihoods = dict(answers)
    assert len(answers) == len(pairs)
    assert likelihoods.keys() == set(range(len(pairs)))
    assert likelihoods[len(pairs) - 1].is_greedy
    for number, (context, continuation) in enumerate(pairs):
        whole = (context + continuation)[-97:]
        targets = min(len(continuation), 96)
        labels = whole[-targets:]
        logprobs = logits_of(model, whole[:-1])[-targets:]
        expected = logprobs[np.arange(targets), labels].sum()
        assert likelihoods[number].logprob == pytest.approx(expected, abs=2e-4)
        assert likelihoods[number].is_greedy == (logprobs.argmax(-1) == labels).all()


def test_requests_that_begin_alike_are_read_together():
    sequences = sorted({tuple(context) for context, _ in likelihood_pairs()})
    families = group_families(sequences, 7 * 35)
    members = sorted(number for family in families for number in family.members)
    assert members == list(range(len(sequences)))
    assert sorted(family.shared for family in families) == [0, 35, 52]
    for shared, members in families:
        assert len({sequences[number][:shared] for number in members}) == 1
        assert all(len(sequences[number]) > shared for number in members)


def test_a_family_must_save_enough_tokens_and_leave_a_token_of_each_member():
    five = [(*range(30), number) for number in range(5)]
    assert group_families(five, 120) == [Family(30, list(range(5)))]
    assert group_families(five, 121) == [Family(0, list(range(5)))]
    assert group_families([*five, five[0][:-1]], 140) == [Family(29, [5, *range(5)])]
    assert group_families([], 1) == []
    assert shared_length((1, 2, 3), (1, 2)) == 2
    assert shared_length((1, 2), (3, 2)) == 0


def respond_alone(model, requests, prompt, stop_strings, max_tokens):
    """Decode a greedy response one token after the other."""
    prompt = list(prompt[-(96 - max_tokens) :])
    tokens = []
    for _ in range(max_tokens):
        tokens.append(int(logits_of(model, prompt + tokens)[-1].argmax()))
        text = requests.model.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if tokens[-1] in requests.model.ends or any(string in text for string in stop_strings):
            break
    return stops.cut_at_stop(text, stop_strings)


def test_responses_are_those_of_each_prompt_alone(requests, model):
    prompts = [context for context, _ in likelihood_pairs()][:22] + [[5, 6], list(range(3, 103))]
    free = dict(requests.responses(prompts, ResponseSettings(max_tokens=16)))
    last_pairs = (re.findall("[!-~]{2}", text)[-1:] for text in dict.fromkeys(free.values()))
    strings = tuple(itertools.islice(itertools.chain(*last_pairs), 4))  # occur in the responses
    stopping = ResponseSettings(stop_strings=strings, max_tokens=16)
    stopped = dict(requests.responses(prompts, stopping))
    assert stopped.keys() == set(range(len(prompts)))
    for number, prompt in enumerate(prompts):
        assert free[number] == respond_alone(model, requests, prompt, (), 16)
        assert stopped[number] == respond_alone(model, requests, prompt, strings, 16)
        assert stopped[number] == stops.cut_at_stop(free[number], strings)
    assert sum(stopped[number] != free[number] for number in stopped) >= 4


def test_responses_that_leave_no_room_for_a_prompt_are_a_user_error(requests):
    settings = ResponseSettings(max_tokens=96)
    with pytest.raises(UserError, match="up to 96 tokens, but the model's max_length is 96"):
        list(requests.responses([[5, 6]], settings))


def test_a_stop_string_is_found_wherever_it_lies_in_the_tokens(tokenizer):
    texts = stops.texts_of_tokens(tokenizer, 304)
    assert texts[tokenizer.eos_token_id] == "<|im_end|>"
    assert texts[-1] == ""
    assert len(texts) == 304
    strings = ["Question", "\n\n", "stop", "opera", "", "<|im_start|>"]
    table = stops.transition_table(strings, texts)
    rng = np.random.default_rng(0)
    stops_met = 0
    for _ in range(3000):
        state = 0
        text = ""
        for token in rng.permutation(len(texts))[:30]:
            state = int(table[state, token])
            text += texts[token]
            is_over = any(string in text for string in strings if string)
            assert (state == len(table)) == is_over, text
            if is_over:
                stops_met += 1
                break
    assert stops_met > 100
    for string in ("Question", "sstop", "ststop", "operopera"):  # letter by letter
        state = 0
        for length, letter in enumerate(string, 1):
            state = int(table[state, texts.index(letter)])
            assert (state == len(table)) == (length == len(string))


def test_a_text_is_cut_before_the_first_stop_string():
    strings = ["Question", "\n\n", "stop", "opera", "", "<|im_start|>"]
    assert stops.cut_at_stop("a stop or a Question", strings) == "a "
    assert stops.cut_at_stop("none", strings) == "none"


def test_without_stop_strings_the_table_stops_nothing(tokenizer):
    table = stops.transition_table([], stops.texts_of_tokens(tokenizer, 300))
    assert table.shape == (1, 300) and not table.any()


def test_lengths_are_rounded_up_to_few_sizes():
    lengths = [1, 8, 9, 12, 13, 17, 24, 25, 100, 129]
    assert list(map(round_up, lengths)) == [8, 8, 12, 12, 16, 24, 24, 32, 128, 192]


def test_a_call_ends_where_lengths_have_halved_and_slots_are_filled():
    lengths = dict(enumerate([9, 8, 4, 4, 4, 4, 2, 2, 1]))
    assert list(group_by_length(lengths, 5, 3)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert list(group_by_length(lengths, 5, 9)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
