"""Share of the floor: how near each phase comes to the seconds that one device needs at the least, by its own rates.

python benchmarks/floor.py                                  tiny and small; --model, --batch, --prompt, --new, ... change sizes
python benchmarks/floor.py --model 1.8b --dtype bfloat16 --batch 64 --prompt 512 --length 2048 --tokens 4096     an accelerator
... --layers 1 --vocabulary 4096                            cuts the model down, to try the script out

Gop        operations that the result needs, two for each weight of a product and token, and 4 heads head_size for each token
           and token that it sees (`shapes.operations`): real tokens, the seen half of causal attention, logits where they are
           read; three times the forward's for a gradient. No norms, softmax or draws, nothing that is computed twice.
GB         bytes that must move: a step of decoding reads the weights once, in the computation's type, and the filled cache;
           AdamW reads parameters, moments and, for the clip's norm first, the gradient twice, and writes the former three.
seconds    the median of --repeats.
GFLOP/s, share of matmul     Gop a second, and over the rate of a large square product in the same run and type.
floor      the larger of Gop at the matmul's rate and GB at the bandwidth, the best of a sum and a matrix-vector product over
           an array far larger than the caches; then its share of the seconds, and which of the two it is.

prefill    a rollout of one token (so with its draw); decode, of one step: a rollout of --new tokens less that, over the
           steps between, so with the draws (top-p 0.9), which the floor leaves out.
scoring    log-probabilities of a microbatch, --tokens in rows of --length, each row filled by two sequences (`microbatch`).
gradient   the policy's, of the same microbatch; AdamW is the step by it. Peak memory is arguments, results and the
           compiler's temporaries, as it stands and with all logits at once.
"""

import argparse
import dataclasses
import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import shapes

from alignjax import config as configs
from alignjax import logprobs, update, vocabulary
from alignjax.models import attention, families
from alignjax.rollout import Rollout
from alignjax.stages import ppo

MODELS = shapes.MODELS | {"1.8b": families.PRESETS["qwen-1.8b"]}


def programs(config: configs.Config):
    return ppo.compiled(
        config, {role: update.make_optimiser(config.optimiser, 1) for role in ("policy", "value")}, end=-1
    )


def rollout(model, prompts: int, prompt: int, new: int):
    """run(params) -> Rollout: top-p 0.9 and no end token."""
    c = configs.Config(stage="ppo", name="benchmark", model=model, ppo=configs.PPO(1, new, top_p=0.9))
    tokens = np.random.default_rng(1).integers(2, model.vocab_size, (prompts, prompt)).astype(np.int32)
    batch = {
        "prompts": tokens,
        "lengths": np.full(prompts, prompt, np.int32),
        "index": np.arange(prompts, dtype=np.int32),
    }
    return functools.partial(programs(c).sample, batch=jax.tree.map(jnp.asarray, batch), key=jax.random.key(0))


def microbatch(model, rows: int, length: int):
    """(config, (Experience, part)): rows filled to the last token by a response of a half and one of a quarter of them, each
    behind a prompt of an eighth."""
    c = configs.Config(stage="ppo", name="benchmark", model=model, microbatch_tokens=rows * length)
    c.data.max_length = c.ppo.response_length = length // 2
    n, rng = 2 * rows, np.random.default_rng(1)
    prompts, lengths = np.full(n, length // 8, np.int32), np.tile(np.int32([length // 2, length // 4]), rows)
    (part,) = ppo.microbatches(c, prompts, lengths, np.arange(n), 1)
    assert part["sequence"].shape == (rows, length) and part["sequence"].min() == 0
    fixed = [rng.normal(size=(n, length // 2)).astype(np.float32) for _ in range(5)]
    tokens = rng.integers(2, model.vocab_size, (n, length)).astype(np.int32)
    sampled = Rollout(tokens, prompts, lengths, fixed[0], np.zeros(n, bool))
    return c, jax.tree.map(jnp.asarray, (ppo.Experience(sampled, *fixed[1:]), part))


def bandwidth() -> float:
    """Bytes a second."""
    x = jnp.ones((2**15, 2**12 if jax.default_backend() == "cpu" else 2**15))
    ways = jax.jit(jnp.sum), jax.jit(lambda x: x @ x[0])
    return x.nbytes / min(statistics.median(shapes.seconds(lambda way=way: way(x), 9)) for way in ways)


def peak(compiled) -> str:
    m = compiled.memory_analysis()
    whole = m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes - m.alias_size_in_bytes
    return f"{whole / 1e9:.3f} GB ({m.temp_size_in_bytes / 1e9:.3f} of temporaries)"


def measure(model, a):
    """Lines of (phase, operations, bytes, seconds), and what to say below them."""
    rows, b, p, r, w = max(a.tokens // a.length, 1), a.batch, a.prompt, a.new, a.length
    median = lambda run: statistics.median(shapes.seconds(run, a.repeats))
    state = update.init_state(shapes.parameters(model, "lm", 0), update.make_optimiser(configs.Optimiser(), 1))
    params, size = state.params, jnp.dtype(model.dtype).itemsize
    short, long = (median(functools.partial(rollout(model, b, p, new), params)) for new in (1, r))
    matrices = shapes.matmul_weights(model) + model.d_model * model.vocab_size
    cache = 2 * model.layers * model.kv_heads * model.head_size * b * (p + r / 2)
    forward = functools.partial(shapes.operations, model)
    lines = [
        (f"prefill {b} x {p}", forward(b * p, (p + 1) / 2, b), 0, short),
        (f"decode {b} at {p}-{p + r}", forward(b, p + r / 2, b), size * (matrices + cache), (long - short) / (r - 1)),
    ]

    config, pair = microbatch(model, rows, w)
    score = jax.jit(lambda params, pair: logprobs.token_logprobs(model, params, ppo.packed(pair[0].sampled, pair[1])))
    needed = forward(rows * w, ((5 * w / 8) ** 2 + (3 * w / 8) ** 2 + w) / (2 * w), rows * 3 * w // 4)
    lines.append((f"scoring {rows} x {w}", needed, 0, median(lambda: score(params, pair))))
    compiled = lambda: programs(config).policy_add.lower(None, params, pair).compile()
    add = compiled()
    lines.append((f"gradient {rows} x {w}", 3 * needed, 0, median(lambda: add(None, params, pair))))
    limit, vocabulary.ELEMENTS = vocabulary.ELEMENTS, 2**62
    name = attention.choose(model.attention, attention.platform(), jnp.dtype(model.dtype),
                            (rows, w, model.heads, model.head_size), model.kv_heads)  # fmt: skip
    said = f"attention {name}, remat {model.remat}; gradient's peak memory {peak(add)}, all logits at once {peak(compiled())}"
    vocabulary.ELEMENTS = limit

    total, step, held = add(None, params, pair), programs(config).policy, [state]
    del params, state, add

    def adamw():
        held[0] = step(held[0], total, None)[0]
        return held[0]

    weights = sum(x.size for x in jax.tree.leaves(held[0].params))
    lines.append(("AdamW", 0, 8 * 4 * weights, median(adamw)))
    return lines, f"{weights / 1e6:.1f} M parameters, {model.dtype}; {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["tiny", "small"], choices=MODELS)
    parser.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"))
    for name, default in {"layers": 0, "vocabulary": 0, "batch": 64, "prompt": 64, "new": 128, "tokens": 4096, "length": 256,
                          "repeats": 5}.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    a, below = parser.parse_args(), []
    print(f"{'':32}      Gop       GB    seconds   GFLOP/s  share of matmul   floor, s  share of floor", flush=True)
    for name in a.model:
        model = MODELS[name]
        model = dataclasses.replace(model, dtype=a.dtype or model.dtype, layers=a.layers or model.layers,
                                    vocab_size=a.vocabulary or model.vocab_size)  # fmt: skip
        rate, bytes_per_second = shapes.matmul_rate(model.dtype), bandwidth()
        lines, said = measure(model, a)
        for phase, operations, moved, seconds in lines:
            floors = {"operations": operations / rate, "bytes": moved / bytes_per_second}
            which = max(floors, key=floors.get)
            done = (
                f"{operations / seconds / 1e9:9.1f} {operations / seconds / rate:16.2f}"
                if operations
                else f"{'-':>9} {'-':>16}"
            )
            print(f"{name + ' ' + phase:32} {operations / 1e9:8.2f} {moved / 1e9:8.3f} {seconds:10.4g} {done} "
                  f"{floors[which]:10.4g} {floors[which] / seconds:9.2f}, {which}", flush=True)  # fmt: skip
        below.append(f"{name}: {said}; matmul {rate / 1e9:.1f} GFLOP/s, bandwidth {bytes_per_second / 1e9:.1f} GB/s")
    print(f"on {jax.devices()[0].device_kind}, jax {jax.__version__}", *below, sep="\n")


if __name__ == "__main__":
    main()
