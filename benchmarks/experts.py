"""Measure a layer of experts beside all experts for every token, and beside no experts.

python benchmarks/experts.py
python benchmarks/experts.py --rounding
python benchmarks/experts.py --tokens 16384 --d 2048 --d-ff 768 --experts 128 --chosen 8 \
    --dtype bfloat16

The first takes sizes for a laptop's CPU. The last is a layer of Qwen3-30B-A3B, for one GPU or TPU.
Each row is a value and its gradient by tokens and kernels, the median of some calls.

experts    alignjax.models.experts: the chosen experts of each token, none dropped.
all        every expert for every token, with the weights of the chosen ones: the simplest program.
dense      one feed-forward network as wide as a token's experts: as many products, no choice.

TFLOP/s counts the products of the chosen experts, in all rows.

--rounding prints how much the log-probabilities of all words change after each token in bfloat16
when four sequences are packed in a row, the largest change of a word: its mean over tokens, its
99th percentile and its maximum, in models of 16 layers with random parameters.
"""

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import shapes  # noqa: E402

from alignjax.config import Model  # noqa: E402
from alignjax.machine.precision import products_of  # noqa: E402
from alignjax.models import experts, transformer  # noqa: E402
from alignjax.models.experts import ExpertKernels, RoutedTokens  # noqa: E402

Mix = Callable[[ExpertKernels, RoutedTokens], jax.Array]


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def kernels_of(model: Model) -> ExpertKernels:
    """Return random kernels with fan-in variance, in float32."""
    inward = (model.experts, model.d_model, model.d_ff)
    outward = (model.experts, model.d_ff, model.d_model)
    return ExpertKernels(
        gate=draw(0, *inward) * model.d_model**-0.5,
        up=draw(1, *inward) * model.d_model**-0.5,
        down=draw(2, *outward) * model.d_ff**-0.5,
    )


def routed_tokens(model: Model, tokens: int) -> RoutedTokens:
    """Return random tokens, for which a random router has chosen experts."""
    probabilities = jax.nn.softmax(draw(3, 1, tokens, model.experts))
    weights, chosen = jax.lax.top_k(probabilities, model.experts_per_token)
    hidden = draw(4, 1, tokens, model.d_model).astype(model.dtype)
    return RoutedTokens(hidden, chosen, weights / weights.sum(axis=-1, keepdims=True))


def chosen_experts(kernels: ExpertKernels, tokens: RoutedTokens) -> jax.Array:
    """Return what alignjax computes."""
    return experts.mix(jax.nn.silu, kernels, tokens)


def all_experts(kernels: ExpertKernels, tokens: RoutedTokens) -> jax.Array:
    """Return the same from the results of every expert for every token."""
    x = tokens.hidden
    gate = jax.nn.silu(jnp.einsum("btd,edf->btef", x, kernels.gate))
    hidden = gate * jnp.einsum("btd,edf->btef", x, kernels.up)
    numbers = jnp.arange(len(kernels.gate))
    is_chosen = tokens.chosen[..., None] == numbers
    weights = jnp.sum(tokens.weights[..., None] * is_chosen, axis=-2).astype(x.dtype)
    return jnp.einsum("btef,bte,efd->btd", hidden, weights, kernels.down)


def dense(kernels: ExpertKernels, tokens: RoutedTokens) -> jax.Array:
    """Return the result of a network that is made of the first experts."""
    count = tokens.chosen.shape[-1]
    width = kernels.gate.shape[1]
    gate = jnp.concatenate(list(kernels.gate[:count]), axis=1)
    up = jnp.concatenate(list(kernels.up[:count]), axis=1)
    down = kernels.down[:count].reshape(-1, width)
    x = tokens.hidden.reshape(-1, width)
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


PROGRAMS: dict[str, Mix] = {"experts": chosen_experts, "all": all_experts, "dense": dense}


def measure(mix: Mix, kernels: ExpertKernels, tokens: RoutedTokens, repeats: int) -> list[float]:
    """Return the seconds of calls of a value and its gradient."""

    @jax.jit
    def gradient(kernels, hidden):
        def loss(kernels, hidden):
            rounded = jax.tree.map(lambda kernel: kernel.astype(hidden.dtype), kernels)
            y = mix(rounded, tokens._replace(hidden=hidden))
            return jnp.sum(y.astype(jnp.float32) ** 2)

        return jax.value_and_grad(loss, argnums=(0, 1))(kernels, hidden)

    return shapes.seconds(lambda: gradient(kernels, tokens.hidden), repeats)


def compare(
    model: Model, tokens: int, repeats: int, programs: Sequence[str] = tuple(PROGRAMS)
) -> dict[str, float]:
    """Return the median milliseconds of some programs."""
    kernels = kernels_of(model)
    routed = routed_tokens(model, tokens)
    with products_of(model.dtype):
        return {
            name: 1e3 * statistics.median(measure(PROGRAMS[name], kernels, routed, repeats))
            for name in programs
        }


def operations(model: Model, tokens: int) -> float:
    """Count the operations of the products of the chosen experts, forward and backward."""
    return 3 * 6.0 * tokens * model.experts_per_token * model.d_model * model.d_ff


BFLOAT16 = Model(
    vocab_size=512, d_model=256, layers=16, heads=8, kv_heads=2, head_size=32, qk_norm=True,
    dtype="bfloat16",
)  # fmt: skip
ROUNDED = {
    "dense": {"d_ff": 1024},
    "4 of 32": {"d_ff": 256, "experts": 32, "experts_per_token": 4},
    "8 of 64": {"d_ff": 128, "experts": 64, "experts_per_token": 8},
}


def changes_by_packing(model: Model) -> np.ndarray:
    """Return for each token the largest change of a word's log-probability, [sequences tokens]."""
    params = shapes.parameters(model, "lm", 0)
    sequences, tokens, packed = 8, 96, 4
    words = np.random.default_rng(0).integers(1, model.vocab_size, (sequences, tokens))
    places = np.tile(np.arange(tokens), (sequences, 1))
    segments = np.tile(np.repeat(np.arange(packed) + 1, tokens), (sequences // packed, 1))

    @jax.jit
    def logprobs(words, places, segments):
        hidden = transformer.apply(model, params, words, places, segments).hidden
        return jax.nn.log_softmax(transformer.logits(model, params, hidden))

    alone = logprobs(words, places, np.ones_like(words))
    shape = segments.shape
    together = logprobs(words.reshape(shape), places.reshape(shape), segments)
    return np.abs(np.asarray(alone - together.reshape(alone.shape))).max(axis=-1)


def print_rounding() -> None:
    """Print the changes of a dense model and of mixtures."""
    for name, fields in ROUNDED.items():
        normalises = "experts" in fields
        model = dataclasses.replace(BFLOAT16, **fields, normalise_experts=normalises)
        changes = changes_by_packing(model)
        percentile = np.quantile(changes, 0.99)
        print(f"{name:8} {changes.mean():.4f}  {percentile:.4f}  {changes.max():.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d", type=int, default=256, help="width of the model")
    parser.add_argument("--d-ff", type=int, default=128, help="width of an expert")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--chosen", type=int, default=2, help="experts of a token")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--rounding", action="store_true", help="what packing changes")
    arguments = parser.parse_args()
    if arguments.rounding:
        print_rounding()
        return
    model = Model(
        d_model=arguments.d,
        d_ff=arguments.d_ff,
        experts=arguments.experts,
        experts_per_token=arguments.chosen,
        dtype=arguments.dtype,
    )
    medians = compare(model, arguments.tokens, arguments.repeats)
    print(f"{jax.devices()[0].device_kind}, {arguments.dtype}: a value and its gradient")
    for name, milliseconds in medians.items():
        ratio = milliseconds / medians["experts"]
        rate = operations(model, arguments.tokens) / milliseconds / 1e9
        print(f"{name:8} {milliseconds:9.2f} ms  {ratio:6.2f}  {rate:8.3f} TFLOP/s")


if __name__ == "__main__":
    main()
