"""An evaluation's requests: families, packing, slots and stop strings against one sequence at a time."""

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
from alignjax.evals.requests import Family, Requests, alike, families
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
def asked(model, tokenizer, request):
    mesh = sharding.make_mesh(Mesh(), jax.devices()[: request.param])
    params = jax.device_put(model[1], sharding.param_shardings(model[1], mesh))
    loaded = LoadedModel(model[0], params, tokenizer, mesh, [tokenizer.eos_token_id])
    return Requests(loaded, tokens=128, slots=4)  # so that families are worth it


@functools.cache
def forward(model):
    @jax.jit
    def logits(params, tokens, length):
        places = jnp.arange(len(tokens))
        hidden, _ = transformer.apply(
            model, params, tokens[None], places[None], (places < length)[None].astype(jnp.int32)
        )
        return jax.nn.log_softmax(transformer.logits(model, params, hidden[0]))

    return logits


def logits_of(model, sequence):
    """log p [t v] behind each token of a sequence, alone in its row."""
    model, params = model
    row = np.zeros(model.max_length, np.int32)
    row[: len(sequence)] = sequence
    return np.asarray(forward(model)(params, row, len(sequence)))[: len(sequence)]


def requests():
    """Two families, continuations of one token and of several to the same contexts, one request alone, two too long."""
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(3, 300, n).tolist()
    out = []
    for shots in (draw(35), draw(52)):
        for _ in range(8):
            context = shots + draw(rng.integers(3, 15))
            out += [(context, draw(1)), (context, draw(1)), (context, draw(3))]
    out += [([7], [8, 9]), (draw(5), draw(20)), (draw(90), draw(20)), (draw(3), draw(120))]
    return [out[i] for i in rng.permutation(len(out))]


def test_loglikelihoods_are_those_of_each_sequence_alone(asked, model):
    pairs, found = requests(), {}
    greedy = logits_of(model, pairs[0][0])[-1].argmax()
    pairs.append((pairs[0][0], [int(greedy)]))

    def done(i, logprob, is_greedy):
        assert i not in found
        found[i] = logprob, is_greedy

    asked.loglikelihoods(pairs, done)
    assert found.keys() == set(range(len(pairs))) and found[len(pairs) - 1][1]
    for i, (context, continuation) in enumerate(pairs):
        whole = (context + continuation)[-97:]
        n = min(len(continuation), 96)
        logprobs = logits_of(model, whole[:-1])[-n:]
        assert found[i][0] == pytest.approx(logprobs[np.arange(n), whole[-n:]].sum(), abs=2e-4)
        assert found[i][1] == (logprobs.argmax(-1) == whole[-n:]).all()


def test_requests_that_begin_alike_are_read_together():
    pairs = requests()
    sequences = sorted({tuple(context) for context, _ in pairs})
    found = families(sequences, 7 * 35)
    assert sorted(i for family in found for i in family.members) == list(range(len(sequences)))
    assert sorted(family.common for family in found) == [0, 35, 52]
    for common, members in found:
        assert len({sequences[i][:common] for i in members}) == 1 and all(
            len(sequences[i]) > common for i in members
        )
    few = [(*range(30), i) for i in range(5)]
    assert families(few, 120) == [Family(30, list(range(5)))]
    assert families(few, 121) == [Family(0, list(range(5)))]
    assert families([*few, few[0][:-1]], 140) == [
        Family(29, [5, *range(5)])
    ]  # of the shortest a token is left
    assert families([], 1) == []
    assert alike((1, 2, 3), (1, 2)) == 2 and alike((1, 2), (3, 2)) == 0


def alone(model, asked, prompt, strings, length):
    """Greedily, one token after the other."""
    prompt, out = list(prompt[-(96 - length) :]), []
    for _ in range(length):
        out.append(int(logits_of(model, prompt + out)[-1].argmax()))
        text = asked.model.tokenizer.decode(
            out, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        if out[-1] in asked.model.end_tokens or any(string in text for string in strings):
            break
    return stops.cut(text, strings)


def test_responses_are_those_of_each_prompt_alone(asked, model):
    prompts = [context for context, _ in requests()][:22] + [[5, 6], list(range(3, 103))]
    free, found = {}, {}
    asked.responses(prompts, free.__setitem__, length=16)
    pairs = (re.findall("[!-~]{2}", text)[-1:] for text in dict.fromkeys(free.values()))
    strings = tuple(itertools.islice(itertools.chain(*pairs), 4))  # that will be met
    asked.responses(prompts, found.__setitem__, strings=strings, length=16)
    assert found.keys() == set(range(len(prompts)))
    for i, prompt in enumerate(prompts):
        assert free[i] == alone(model, asked, prompt, (), 16)
        assert found[i] == alone(model, asked, prompt, strings, 16) == stops.cut(free[i], strings)
    assert sum(found[i] != free[i] for i in found) >= 4
    with pytest.raises(UserError, match="up to 96 tokens wanted, but the model's max_length is 96"):
        asked.responses(prompts, found.__setitem__, length=96)


def test_a_stop_string_is_found_wherever_it_lies_in_the_tokens(tokenizer):
    words = stops.words_of(tokenizer, 304)
    assert words[tokenizer.eos_token_id] == "<|im_end|>" and words[-1] == "" and len(words) == 304
    strings, ends = ["Question", "\n\n", "stop", "opera", "", "<|im_start|>"], [0]
    table = stops.table(strings, ends, words)
    rng, met = np.random.default_rng(0), 0
    for _ in range(3000):
        state, text = 0, ""
        for token in rng.permutation(len(words))[:30]:
            state, text = int(table[state, token]), text + words[token]
            over = token in ends or any(string in text for string in strings if string)
            assert (state == len(table)) == over, text
            if over:
                met += token not in ends
                break
    assert met > 100
    for string in ("Question", "sstop", "ststop", "operopera"):  # letter by letter
        state = 0
        for i, letter in enumerate(string):
            state = int(table[state, words.index(letter)])
            assert (state == len(table)) == (i + 1 == len(string))
    assert (
        stops.cut("a stop or a Question", strings) == "a " and stops.cut("none", strings) == "none"
    )


def test_without_stop_strings_the_end_tokens_are_left(tokenizer):
    table = stops.table([], [5, 7], stops.words_of(tokenizer, 300))
    assert table.shape == (1, 300) and np.flatnonzero(table[0]).tolist() == [5, 7]


def test_sizes_are_few():
    assert [round_up(n) for n in (1, 8, 9, 12, 13, 17, 24, 25, 100, 129)] == [
        8,
        8,
        12,
        12,
        16,
        24,
        24,
        32,
        128,
        192,
    ]


def test_a_call_ends_where_lengths_have_halved_and_slots_are_filled():
    lengths = dict(enumerate([9, 8, 4, 4, 4, 4, 2, 2, 1]))
    assert list(group_by_length(lengths, 5, 3)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert list(group_by_length(lengths, 5, 9)) == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
