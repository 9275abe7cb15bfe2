"""Share of the floor: how near each phase comes to the seconds that one device needs at the least, at its own rates.

python benchmarks/floor.py                       tiny and small; --model, --batch, --prompt, ... choose others
python benchmarks/floor.py --model 1.8b --prompt 512 --length 2048        what an accelerator is to be asked
python benchmarks/floor.py --model 1.8b --layers 1 --vocabulary 4096      cut down, to try it out anywhere

prefill    a rollout of one new token, its draw included.
decode     a step of it: what a rollout of --new tokens takes longer than that, over the steps between; so with the
           draws (top-p 0.9), which the floor leaves out.
scoring    the policy's log-probabilities of a microbatch: --tokens in rows of --length, of two sequences each.
gradient   the policy's gradient of that microbatch; AdamW: the optimiser's step by it.

Gop        10^9 operations that the result asks for (`shapes.operations`): two for each weight of a product and token,
           four for each head's channel, token and token seen; only what is causal and of one sequence, only the
           logits that are read. A gradient's are three times the forward's. No norms, softmax, draws, recomputation.
GB         10^9 bytes that have to move. decode: the weights, in the computation's type, and the filled cache, once.
           AdamW: parameters, two moments and, as the clip comes first, twice the gradient in; all but that out.
seconds    the median of --repeats.
GFLOP/s    Gop a second, then its share of a large square product's, in the same type and the same run.
floor      the larger of Gop at that rate and GB at the bandwidth at which an array far larger than the caches is read
           (the better of a sum and a matrix-vector product), then its share of the seconds, and which of the two it is.

Rates are measured before and after a model's phases; the better ones count. The lines below say how much memory the
gradient takes (arguments, results, temporaries), as the program is and with the logits of all words at once.
"""

import argparse
import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import shapes
from sampling import programs, rollout
from scaling import microbatch

from alignjax import config as configs
from alignjax.algorithms import experience, optimisation
from alignjax.models import attention, families, scoring, vocabulary

MODELS = shapes.MODELS | {"1.8b": families.PRESETS["qwen-1.8b"]}


def bandwidth() -> float:
    """Bytes a second."""
    x = jnp.ones((2**15, 2**12 if jax.default_backend() == "cpu" else 2**15))
    ways = jax.jit(jnp.sum), jax.jit(lambda x: x @ x[0])
    return x.nbytes / min(
        statistics.median(shapes.seconds(lambda way=way: way(x), 9)) for way in ways
    )


def peak(compiled) -> str:
    m = compiled.memory_analysis()
    whole = (
        m.argument_size_in_bytes
        + m.output_size_in_bytes
        + m.temp_size_in_bytes
        - m.alias_size_in_bytes
    )
    return f"{whole / 1e9:.3f} GB ({m.temp_size_in_bytes / 1e9:.3f} of temporaries)"


def median(run, a) -> float:
    return statistics.median(shapes.seconds(run, a.repeats))


def sampling(model, params, a):
    """Lines of (phase, operations, bytes, seconds)."""
    b, p, r = a.batch, a.prompt, a.new
    short, long = (
        median(functools.partial(rollout(model, b, p, new), params), a) for new in (1, r)
    )
    yield f"prefill {b} x {p}", shapes.operations(model, b * p, (p + 1) / 2, b), 0, short
    seen = p + r / 2  # of r - 1 steps, the first of which sees p + 1 tokens and the last p + r - 1
    weights = shapes.matmul_weights(model) + model.d_model * model.vocab_size
    cache = 2 * model.layers * model.kv_heads * model.head_size * b * seen
    moved = (weights + cache) * jnp.dtype(model.dtype).itemsize
    yield (
        f"decode {b} at {p}-{p + r}",
        shapes.operations(model, b, seen, b),
        moved,
        (long - short) / (r - 1),
    )


def learning(model, state, a, said: list):
    """As `sampling`; what else there is to say goes into `said`. The arrays of `state` are used up."""
    w, rows = a.length, max(a.tokens // a.length, 1)
    config, pair = microbatch(model, rows, w)
    seen = ((5 * w / 8) ** 2 + (3 * w / 8) ** 2 + w) / (2 * w)
    forward = shapes.operations(model, rows * w, seen, rows * w * 3 // 4)
    batch = lambda pair: experience.packed(pair[0].sampled, pair[1])
    read = jax.jit(lambda params, pair: scoring.token_logprobs(model, params, batch(pair)))
    yield f"scoring {rows} x {w}", forward, 0, median(lambda: read(state.params, pair), a)

    compiled = lambda: programs(config).policy_add.lower(None, state.params, pair).compile()
    add, limit, vocabulary.ELEMENTS = compiled(), vocabulary.ELEMENTS, 2**62
    said += [
        "gradient's peak memory",
        peak(add),
        "and with all logits at once",
        peak(compiled()) + ";",
    ]
    vocabulary.ELEMENTS = limit
    yield f"gradient {rows} x {w}", 3 * forward, 0, median(lambda: add(None, state.params, pair), a)

    total, step, weights = (
        add(None, state.params, pair),
        programs(config).policy,
        jax.tree.leaves(state.params),
    )
    moved = 8 * sum(x.nbytes for x in weights)
    del weights

    def adamw():
        nonlocal state
        state = step(state, total, None)[0]
        return state

    yield "AdamW", 0, moved, median(adamw, a)


def measure(name: str, a) -> str:
    """Prints the lines of one model; what there is to say below them."""
    model = MODELS[name]
    model = dataclasses.replace(
        model,
        dtype=a.dtype or model.dtype,
        layers=a.layers or model.layers,
        vocab_size=a.vocabulary or model.vocab_size,
    )
    rates = [(shapes.matmul_rate(model.dtype), bandwidth())]
    state = optimisation.init_state(
        shapes.parameters(model, "lm", 0), optimisation.make_optimiser(configs.Optimiser(), 1)
    )
    shape = max(a.tokens // a.length, 1), a.length, model.heads, model.head_size
    kernel = attention.choose(
        model.attention, attention.platform(), jnp.dtype(model.dtype), shape, model.kv_heads
    )
    million = sum(x.size for x in jax.tree.leaves(state.params)) / 1e6
    said = [
        f"{name}: {million:.1f} M parameters, {model.dtype}, attention {kernel}, remat {model.remat},"
    ]
    lines = [*sampling(model, state.params, a), *learning(model, state, a, said)]
    del state
    rates.append((shapes.matmul_rate(model.dtype), bandwidth()))
    rate, moves = map(max, zip(*rates, strict=True))
    for phase, operations, moved, seconds in lines:
        floors = {"operations": operations / rate, "bytes": moved / moves}
        which = max(floors, key=floors.get)
        done, share = operations / seconds, floors[which] / seconds
        print(
            f"{name + ' ' + phase:28} {operations / 1e9:9.2f} {moved / 1e9:8.3f} {seconds:10.4g} {done / 1e9:10.1f}"
            f" {done / rate:10.2f} {floors[which]:10.4g} {share:10.2f} {which}",
            flush=True,
        )
    return " ".join((*said, f"matmul {rate / 1e9:.1f} GFLOP/s, bandwidth {moves / 1e9:.1f} GB/s"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["tiny", "small"], choices=MODELS)
    parser.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"))
    sizes = dict(
        layers=0, vocabulary=0, batch=64, prompt=64, new=128, tokens=4096, length=256, repeats=5
    )
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    a = parser.parse_args()
    print(
        " " * 28,
        "      Gop       GB    seconds    GFLOP/s  of matmul   floor, s  its share",
        flush=True,
    )
    said = [measure(name, a) for name in a.model]
    print(f"on {jax.devices()[0].device_kind}, jax {jax.__version__}", *said, sep="\n")


if __name__ == "__main__":
    main()
