"""Measure how near each phase comes to its floor: the least seconds that one device needs for it.

python benchmarks/floor.py
python benchmarks/floor.py --model 1.8b --prompt 512 --length 2048
python benchmarks/floor.py --model 1.8b --layers 1 --vocabulary 4096

The first measures tiny and small. The second is meant for an accelerator. The third is cut down, to
try it anywhere. Further options choose the sizes.

prefill    a rollout of one new token, with its draw.
decode     one step: the time by which a rollout of --new tokens takes longer than that, over the
           steps between. It includes the draws (top-p 0.9), which the floor leaves out.
scoring    the policy's log-probabilities of a microbatch: --tokens in rows of --length, of two
           sequences each.
gradient   the policy's gradient of that microbatch.
AdamW      the optimiser's step by that gradient.

Gop        10^9 operations that the result requires (`shapes.operations`): two for each weight of a
           product and token, four for each head's channel, token and token seen; only what is
           causal and of one sequence, and only the logits that are read. A gradient has three times
           the operations of the forward pass. Norms, softmax, draws and recomputation do not count.
GB         10^9 bytes that must move. decode: the weights, in the type of the computation, and the
           filled cache, once. AdamW: it reads parameters, two moments and, because the clip comes
           first, twice the gradient; it writes all of these but the gradient.
seconds    the median of --repeats.
GFLOP/s    Gop a second, then its share of the rate of a large square product, in the same type and
           the same run.
floor      the larger of Gop at that rate, and GB at the bandwidth at which an array far larger than
           the caches is read (the better of a sum and a matrix-vector product); then its share of
           the seconds, and which of the two it is.

Rates are measured before and after a model's phases; the better ones count. The lines at the end
say how much memory the gradient takes (arguments, results, temporaries), as the program is and with
the logits of all words at once.
"""

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import shapes
from jax.stages import Compiled
from sampling import rollout_program
from scaling import learning_config, learning_part, policy_gradient

from alignjax import config as configs
from alignjax.algorithms import experience, optimisation, ppo_programs
from alignjax.algorithms.optimisation import TrainState
from alignjax.algorithms.ppo_programs import LearningPart
from alignjax.config import Model
from alignjax.models import attention, families, scoring, vocabulary

MODELS = shapes.MODELS | {"1.8b": families.PRESETS["qwen-1.8b"]}
REPEATS_OF_RATES = 9
ALL_LOGITS = 2**62  # elements: more than any array of logits has
HEADING = "      Gop       GB    seconds    GFLOP/s  of matmul   floor, s  its share"


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase that was measured, and what its result requires."""

    name: str
    operations: float = 0.0
    moved: float = 0.0  # bytes
    seconds: float


@dataclass(frozen=True)
class Rates:
    """What the device reaches."""

    operations: float  # a second
    bandwidth: float  # bytes a second

    def better(self, other: "Rates") -> "Rates":
        return Rates(max(self.operations, other.operations), max(self.bandwidth, other.bandwidth))


def measure_rates(dtype: str) -> Rates:
    return Rates(shapes.matmul_rate(dtype), measure_bandwidth())


def measure_bandwidth() -> float:
    """Return the bytes a second of the better of a sum and a matrix-vector product."""
    width = 2**12 if jax.default_backend() == "cpu" else 2**15
    array = jnp.ones((2**15, width))
    total = jax.jit(jnp.sum)
    product = jax.jit(lambda x: x @ x[0])
    seconds = [
        statistics.median(shapes.seconds(lambda: total(array), REPEATS_OF_RATES)),
        statistics.median(shapes.seconds(lambda: product(array), REPEATS_OF_RATES)),
    ]
    return array.nbytes / min(seconds)


def median_seconds(function: Callable, repeats: int) -> float:
    return statistics.median(shapes.seconds(function, repeats))


def sampling_phases(model: Model, params: dict, arguments: argparse.Namespace) -> Iterator[Phase]:
    """Measure prefill and decoding."""
    prompts = arguments.batch
    prompt = arguments.prompt
    new = arguments.new
    seconds = {}
    for tokens in (1, new):
        program = rollout_program(model, prompts, prompt, tokens)
        seconds[tokens] = median_seconds(functools.partial(program, params), arguments.repeats)
    yield Phase(
        name=f"prefill {prompts} x {prompt}",
        operations=shapes.operations(model, prompts * prompt, (prompt + 1) / 2, prompts),
        seconds=seconds[1],
    )
    # The first of the steps between sees prompt + 1 tokens, and the last prompt + new - 1.
    steps = new - 1
    seen = prompt + new / 2
    weights = shapes.matmul_weights(model) + model.d_model * model.vocab_size
    cache = 2 * model.layers * model.kv_heads * model.head_size * prompts * seen
    yield Phase(
        name=f"decode {prompts} at {prompt}-{prompt + new}",
        operations=shapes.operations(model, prompts, seen, prompts),
        moved=(weights + cache) * jnp.dtype(model.dtype).itemsize,
        seconds=(seconds[new] - seconds[1]) / steps,
    )


class Learning:
    """The phases that learn from one microbatch; the arrays of `state` are used up."""

    def __init__(self, model: Model, state: TrainState, arguments: argparse.Namespace):
        self.model = model
        self.state = state
        self.repeats = arguments.repeats
        self.length = arguments.length
        self.rows = max(arguments.tokens // arguments.length, 1)
        self.config = learning_config(model, self.rows, self.length)
        self.part = learning_part(self.config, self.rows, self.length)
        self.gradient = self.compile_gradient()

    def compile_gradient(self) -> Compiled:
        return policy_gradient(self.config).lower(self.state.params, self.part).compile()

    def memory(self) -> str:
        """Return the memory of the gradient, as it is and with all logits at once."""
        limit = vocabulary.ELEMENTS
        vocabulary.ELEMENTS = ALL_LOGITS
        dense = self.compile_gradient()
        vocabulary.ELEMENTS = limit
        return (
            f"gradient's peak memory {peak_memory(self.gradient)} "
            f"and with all logits at once {peak_memory(dense)};"
        )

    def forward_operations(self) -> float:
        """Count the operations of a forward pass: two sequences of 5/8 and 3/8 of each row."""
        length = self.length
        seen = ((5 * length / 8) ** 2 + (3 * length / 8) ** 2 + length) / (2 * length)
        tokens = self.rows * length
        return shapes.operations(self.model, tokens, seen, tokens * 3 // 4)

    def phases(self) -> Iterator[Phase]:
        """Measure scoring, the gradient and the optimiser's step."""
        size = f"{self.rows} x {self.length}"
        read = jax.jit(functools.partial(read_policy, self.model))
        yield Phase(
            name=f"scoring {size}",
            operations=self.forward_operations(),
            seconds=median_seconds(lambda: read(self.state.params, self.part), self.repeats),
        )
        yield Phase(
            name=f"gradient {size}",
            operations=3 * self.forward_operations(),
            seconds=median_seconds(self.run_gradient, self.repeats),
        )
        total = self.run_gradient()
        optimiser = optimisation.make_optimiser(self.config.optimiser, 1)
        update = optimisation.compile_update(
            functools.partial(ppo_programs.update_policy, self.config, optimiser)
        )
        parameter_bytes = sum(array.nbytes for array in jax.tree.leaves(self.state.params))

        def step() -> TrainState:
            self.state, _ = update(self.state, total, None)
            return self.state

        yield Phase(
            name="AdamW",
            moved=8 * parameter_bytes,
            seconds=median_seconds(step, self.repeats),
        )

    def run_gradient(self) -> optimisation.GradientSum:
        return optimisation.GradientSum(*self.gradient(self.state.params, self.part))


def read_policy(model: Model, params: dict, part: LearningPart) -> tuple[jax.Array, jax.Array]:
    """Return the log-probabilities and entropies of a microbatch."""
    made, microbatch = part
    packed = experience.pack_tokens(made.rollout, microbatch)
    return scoring.token_logprobs(model, params, packed, microbatch.targets)


def peak_memory(compiled: Compiled) -> str:
    memory = compiled.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )
    temporaries = memory.temp_size_in_bytes
    return f"{peak / 1e9:.3f} GB ({temporaries / 1e9:.3f} of temporaries)"


def chosen_model(name: str, arguments: argparse.Namespace) -> Model:
    model = MODELS[name]
    return dataclasses.replace(
        model,
        dtype=arguments.dtype or model.dtype,
        layers=arguments.layers or model.layers,
        vocab_size=arguments.vocabulary or model.vocab_size,
    )


def measure_model(name: str, arguments: argparse.Namespace) -> str:
    """Print the lines of one model, and return the line to print about it at the end."""
    model = chosen_model(name, arguments)
    rates = measure_rates(model.dtype)
    optimiser = optimisation.make_optimiser(configs.Optimiser(), 1)
    state = optimisation.init_state(shapes.parameters(model, "lm", 0), optimiser)
    description = describe_model(name, model, state.params, arguments)
    phases = list(sampling_phases(model, state.params, arguments))
    learning = Learning(model, state, arguments)
    memory = learning.memory()
    phases += learning.phases()
    del learning, state
    rates = rates.better(measure_rates(model.dtype))
    for phase in phases:
        print_phase(name, phase, rates)
    return (
        f"{description} {memory} matmul {rates.operations / 1e9:.1f} GFLOP/s, "
        f"bandwidth {rates.bandwidth / 1e9:.1f} GB/s"
    )


def describe_model(name: str, model: Model, params: dict, arguments: argparse.Namespace) -> str:
    rows = max(arguments.tokens // arguments.length, 1)
    shape = (rows, arguments.length, model.heads, model.head_size)
    dtype = jnp.dtype(model.dtype)
    kernel = attention.choose(model.attention, attention.platform(), dtype, shape, model.kv_heads)
    millions = sum(array.size for array in jax.tree.leaves(params)) / 1e6
    return (
        f"{name}: {millions:.1f} M parameters, {model.dtype}, attention {kernel}, "
        f"remat {model.remat},"
    )


def print_phase(name: str, phase: Phase, rates: Rates) -> None:
    floors = {
        "operations": phase.operations / rates.operations,
        "bytes": phase.moved / rates.bandwidth,
    }
    bound = max(floors, key=floors.get)
    rate = phase.operations / phase.seconds
    share = floors[bound] / phase.seconds
    print(
        f"{name + ' ' + phase.name:28} {phase.operations / 1e9:9.2f} {phase.moved / 1e9:8.3f} "
        f"{phase.seconds:10.4g} {rate / 1e9:10.1f} {rate / rates.operations:10.2f} "
        f"{floors[bound]:10.4g} {share:10.2f} {bound}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=["tiny", "small"], choices=MODELS)
    parser.add_argument("--dtype", default="", choices=("", "float32", "bfloat16"))
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(" " * 28, HEADING, flush=True)
    lines = [measure_model(name, arguments) for name in arguments.model]
    print(f"on {jax.devices()[0].device_kind}, jax {jax.__version__}", *lines, sep="\n")


if __name__ == "__main__":
    main()
