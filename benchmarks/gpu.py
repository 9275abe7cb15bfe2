"""Measure what matters on one GPU: decoding, scoring, updates, PPO, and how exact all of it is.

python benchmarks/gpu.py
python benchmarks/gpu.py --trl-python PYTHON --tunix-python PYTHON
python benchmarks/gpu.py --tiny

The first prints all rows in under four minutes on a machine with a GPU, the second those of peers
too (see peers/), the third runs everything at a tiny size, to try it anywhere. Models have random
parameters, float32 masters and bfloat16 products.

card       the rate of a large square product in bfloat16, and the bandwidth of reading an array.
decode     a step of a rollout with top-p 0.9: the time by which a long rollout takes longer than a
           short one. The floor is that of the weights and the filled cache at the bandwidth.
           Launches are those of the compiled step, by `planning.launches`.
scoring    log-probabilities of a packed microbatch, as a share of the rate of products.
update     gradients of all microbatches of a minibatch of the policy, and AdamW's step.
ppo        an iteration of 64 prompts of 256 tokens with 256 response tokens, in 4 minibatches: the
           first one, with nothing compiled before, then the median of those that compile nothing.
attention  each kernel that can run here, forward and backward on packed rows, and its distance
           from float32 (the root of the mean square, relative).
experts    a layer of Qwen3-30B-A3B's experts, a value and its gradient, beside a network that is as
           wide as a token's experts; see experts.py.
exact      bfloat16 against float32: log-probabilities, and greedy tokens up to the first that
           differs.

Each section is a process of its own, with --limit seconds, and a peer has --peer-limit; one that
fails or takes too long is a line, and the others go on. The last line has everything as JSON.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import experts
import jax
import jax.numpy as jnp
import numpy as np
import ppo
import shapes
from floor import Learning, measure_rates
from sampling import rollout_program

from alignjax import config as configs
from alignjax.algorithms import optimisation
from alignjax.config import Config, Model, UserError
from alignjax.machine import sharding
from alignjax.machine.precision import products_of
from alignjax.machine.profile import Compilations
from alignjax.models import attention, families, scoring, transformer
from alignjax.planning import hlo, launches
from alignjax.sampling import rollout as default_sampler
from alignjax.sampling.types import Prompts, SamplingSettings

HERE = Path(__file__).resolve().parent
END = 1
TINY = Model(
    d_model=64, d_ff=128, layers=2, heads=4, kv_heads=2, head_size=16, vocab_size=512,
    max_length=512, dtype="bfloat16",
)  # fmt: skip

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is measured of a model."""

    model: Model
    rows: int  # that decode at once, and prompts of an iteration
    prompt: int  # tokens
    response: int  # tokens
    microbatch_tokens: int

    @property
    def width(self) -> int:
        return self.prompt + self.response


def shape_of(name: str, tiny: bool) -> Shape:
    """Return the shape "0.5b", "1.8b" or "30b-a3b", or a tiny one in its place."""
    if tiny:
        model = dataclasses.replace(TINY, experts=4, experts_per_token=2)
        return Shape(
            model=model if name == "30b-a3b" else TINY,
            rows=8,
            prompt=16,
            response=16,
            microbatch_tokens=128,
        )
    preset = {"0.5b": "qwen2.5-0.5b", "1.8b": "qwen-1.8b", "30b-a3b": "qwen3-30b-a3b"}[name]
    model = dataclasses.replace(families.PRESETS[preset], dtype="bfloat16", remat="everything")
    if name == "0.5b":
        return Shape(model=model, rows=64, prompt=256, response=256, microbatch_tokens=8192)
    return Shape(model=model, rows=32, prompt=512, response=512, microbatch_tokens=8192)


def card(shape: Shape) -> Figures:
    """Measure the rates of this device, and say which one it is."""
    rates = measure_rates(shape.model.dtype)
    return {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "tflops": rates.operations / 1e12,
        "gb_per_s": rates.bandwidth / 1e9,
    }


def decode(shape: Shape) -> Figures:
    """Measure a step of decoding and count what it launches."""
    model = shape.model
    params = shapes.parameters(model, "lm", 0)
    params = jax.jit(functools.partial(transformer.for_sampling, model))(params)
    seconds = {}
    for tokens in (2, shape.response):
        program = rollout_program(model, shape.rows, shape.prompt, tokens)
        times = shapes.seconds(functools.partial(program, params), 3)
        seconds[tokens] = statistics.median(times)
    step = (seconds[shape.response] - seconds[2]) / (shape.response - 2)
    text = program.sample.lower(params, program.prompts, program.key).compile().as_text()
    body = launches.loop_bodies(hlo.parse_module(text))[0]
    weights = shapes.matmul_weights(model) + model.d_model * model.vocab_size
    seen = shape.rows * (shape.prompt + shape.response / 2)
    cache = 2 * model.layers * model.kv_heads * model.head_size * seen
    return {
        "ms": 1e3 * step,
        "gb": (weights + cache) * jnp.dtype(model.dtype).itemsize / 1e9,
        "launches": body.total,
        "launches_a_layer": body.total / model.layers,
    }


def learn(shape: Shape) -> Figures:
    """Measure scoring and an update of the policy by one microbatch."""
    optimiser = optimisation.make_optimiser(configs.Optimiser(), 1)
    state = optimisation.init_state(shapes.parameters(shape.model, "lm", 0), optimiser)
    arguments = argparse.Namespace(repeats=3, tokens=shape.microbatch_tokens, length=shape.width)
    learning = Learning(shape.model, state, arguments)
    phases = list(learning.phases())
    scored, gradient, adamw = phases
    update = 4 * gradient.seconds + adamw.seconds  # as many microbatches as a minibatch may have
    return {
        "scoring_ms": 1e3 * scored.seconds,
        "scoring_tflops": scored.operations / scored.seconds / 1e12,
        "gradient_ms": 1e3 * gradient.seconds,
        "gradient_tflops": gradient.operations / gradient.seconds / 1e12,
        "update_tflops": 4 * gradient.operations / update / 1e12,
        "adamw_ms": 1e3 * adamw.seconds,
        "memory": learning_memory(learning),
    }


def learning_memory(learning: Learning) -> float:
    """Return the GB of temporaries of the gradient."""
    return learning.gradient.memory_analysis().temp_size_in_bytes / 1e9


def ppo_config(shape: Shape) -> Config:
    config = ppo.make_config("tiny", slots=0, microbatch_tokens=shape.microbatch_tokens)
    config.model = shape.model
    config.data.batch = shape.rows
    config.data.max_length = shape.prompt
    config.ppo.response_length = shape.response
    return config


def iterations(shape: Shape) -> Figures:
    """Measure PPO's first iteration and its median one, by phase."""
    start = time.perf_counter()
    runs = ppo.Iterations(ppo_config(shape))
    jax.block_until_ready((runs.state, runs.stage.frozen))
    made = time.perf_counter() - start
    timed = []
    first = None
    programs = 0
    with jax.set_mesh(runs.mesh), Compilations() as compilations:
        while len(timed) < 3:
            seconds = runs.run()
            first = first or sum(seconds.values())
            count = compilations.end_step(0)
            if count == programs:
                timed.append(seconds)
            programs = count
    medians = {
        phase: statistics.median(seconds[phase] for seconds in timed) for phase in ppo.PHASES
    }
    return {"roles_s": made, "first_s": first, "s": sum(medians.values()), **medians}


def attention_kernels(shape: Shape) -> Figures:
    """Time the kernels of attention that can run here, and compare them with float32."""
    model = shape.model
    rows = max(shape.microbatch_tokens // shape.width, 1)
    random = np.random.default_rng(0)

    def draw(heads: int) -> jax.Array:
        numbers = random.normal(size=(rows, shape.width, heads, model.head_size))
        return jnp.asarray(numbers, model.dtype)

    vectors = (draw(model.heads), draw(model.kv_heads), draw(model.kv_heads))
    weights = draw(model.heads).astype(jnp.float32)
    cut = shape.width * 5 // 8
    segments = jnp.asarray(np.tile(1 + (np.arange(shape.width) >= cut), (rows, 1)), jnp.int32)

    def gradients(kernel: str, vectors: tuple) -> tuple:
        def total(vectors):
            seen = attention.self_attention(*vectors, segments, kernel)
            return jnp.sum(seen.astype(jnp.float32) * weights)

        return jax.grad(total)(vectors)

    exact = jax.jit(functools.partial(gradients, "xla"))(
        tuple(vector.astype(jnp.float32) for vector in vectors)
    )
    figures = {}
    for kernel in attention.IMPLEMENTATIONS:
        program = jax.jit(functools.partial(gradients, kernel))
        try:
            program.lower(vectors)
        except (UserError, NotImplementedError, RuntimeError):
            continue  # not of this device
        seconds = statistics.median(shapes.seconds(lambda call=program: call(vectors), 5))
        figures[kernel] = {"ms": 1e3 * seconds, "error": distance(program(vectors), exact)}
    return figures


def distance(ours: Any, exact: Any) -> float:
    """Return the largest relative distance of arrays, by the root of the mean square."""
    errors = [
        float(jnp.sqrt(jnp.mean((a.astype(jnp.float32) - b) ** 2) / jnp.mean(b**2)))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
    ]
    return max(errors)


def expert_layer(shape: Shape) -> Figures:
    """Measure the experts of a layer, and the rate that they reach."""
    tokens = shape.microbatch_tokens
    medians = experts.compare(shape.model, tokens, repeats=5, programs=("experts", "dense"))
    figures = {f"{name}_ms": milliseconds for name, milliseconds in medians.items()}
    operations = experts.operations(shape.model, tokens)
    return figures | {"tflops": operations / medians["experts"] / 1e9}


def exactness(shape: Shape) -> Figures:
    """Compare bfloat16 with float32: log-probabilities of random text, and greedy responses."""
    rows = 8
    params = shapes.parameters(shape.model, "lm", 0)
    random = np.random.default_rng(0)
    tokens = random.integers(2, shape.model.vocab_size, (rows, shape.width)).astype(np.int32)
    packed = scoring.PackedTokens(
        tokens=jnp.asarray(tokens),
        positions=jnp.tile(jnp.arange(shape.width), (rows, 1)),
        segments=jnp.ones((rows, shape.width), jnp.int32),
    )
    targets = jnp.tile(jnp.arange(1, shape.width), (rows, 1))
    prompts = Prompts(
        tokens=jnp.asarray(tokens[:, : shape.prompt]),
        lengths=jnp.full(rows, shape.prompt),
        index=jnp.arange(rows),
    )
    logprobs = {}
    greedy = {}
    for dtype in ("bfloat16", "float32"):
        model = dataclasses.replace(shape.model, dtype=dtype)
        settings = SamplingSettings(
            model=model,
            samples_per_prompt=1,
            response_length=16,
            temperature=0.0,
            top_p=1.0,
            end_tokens=(-1,),
        )
        with products_of(dtype):
            read = jax.jit(functools.partial(scoring.token_logprobs, model))
            logprobs[dtype] = np.asarray(read(params, packed, targets)[0])
            sample = jax.jit(functools.partial(default_sampler.generate, settings=settings))
            responses = sample(params, prompts, jax.random.key(0)).tokens
            greedy[dtype] = np.asarray(responses)[:, shape.prompt :]
    change = np.abs(logprobs["bfloat16"] - logprobs["float32"])
    same = np.cumprod(greedy["bfloat16"] == greedy["float32"], axis=1)
    return {
        "logprob_mean": float(change.mean()),
        "logprob_max": float(change.max()),
        "same_first_tokens": float(same[:, 0].mean()),
        "same_tokens": float(same.mean()),
        "holds": bool(change.mean() < scoring.SELF_CHECK_LIMITS["bfloat16"] / 2),
    }


SECTIONS: dict[str, tuple[Callable[[Shape], Figures], str]] = {
    "card": (card, "0.5b"),
    "decode 0.5b": (decode, "0.5b"),
    "decode 1.8b": (decode, "1.8b"),
    "learn 0.5b": (learn, "0.5b"),
    "learn 1.8b": (learn, "1.8b"),
    "ppo 0.5b": (iterations, "0.5b"),
    "attention": (attention_kernels, "0.5b"),
    "experts": (expert_layer, "30b-a3b"),
    "exact": (exactness, "0.5b"),
}
PEERS = {"trl": "trl_ppo.py", "tunix": "tunix_ppo.py"}


def run_section(name: str, tiny: bool) -> Figures:
    """Run a section in this process."""
    measure, size = SECTIONS[name]
    with jax.set_mesh(sharding.make_mesh(configs.Mesh())):
        return measure(shape_of(size, tiny))


def run_apart(command: list[str], limit: float) -> Figures:
    """Run a command whose last line is JSON; return that, or what went wrong as "failed"."""
    start = time.perf_counter()
    environment = {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}
    printed = output_of(command, limit, environment)
    if "failed" in printed:
        return printed
    figures = json.loads(printed["output"].strip().splitlines()[-1])
    return figures | {"section_s": time.perf_counter() - start}


def peer_iteration(command: list[str], limit: float) -> Figures:
    """Return the median seconds of a peer's iterations, from what its script prints."""
    printed = output_of(command, limit, {})
    if "failed" in printed:
        return printed
    lists = re.findall(r"seconds_per_iteration (\[.*?\])", printed["output"])
    if not lists or not json.loads(lists[-1]):
        return {"failed": "no iteration was printed"}
    seconds = json.loads(lists[-1])
    return {"s": statistics.median(seconds), "iterations": len(seconds)}


def output_of(command: list[str], limit: float, environment: dict[str, str]) -> Figures:
    """Run a command; return what it prints as "output", or what went wrong as "failed"."""
    variables = os.environ | environment
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {limit:g} s"}
    except OSError as error:
        return {"failed": str(error)}
    if done.returncode or not done.stdout.strip():
        lines = done.stderr.strip().splitlines()
        return {"failed": f"exit code {done.returncode}: {lines[-1] if lines else 'no output'}"}
    return {"output": done.stdout}


def describe(figures: Figures) -> str:
    """Return figures as one line."""
    return "  ".join(f"{name} {shown(value)}" for name, value in figures.items())


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"({describe(value)})" if isinstance(value, dict) else str(value)


def shares(results: dict[str, Figures]) -> Figures:
    """Return the rows of the table: seconds, and shares of what the card reaches."""
    rates = results.get("card", {})
    rows = {}
    for size in ("0.5b", "1.8b"):
        step = results.get(f"decode {size}", {})
        learned = results.get(f"learn {size}", {})
        if "ms" in step and "gb_per_s" in rates:
            floor = step["gb"] / rates["gb_per_s"]
            rows[f"decode step {size}, ms"] = step["ms"]
            rows[f"decode step {size}, of the bandwidth"] = 1e3 * floor / step["ms"]
            rows[f"decode step {size}, launches a layer"] = step["launches_a_layer"]
        if "update_tflops" in learned and "tflops" in rates:
            rows[f"scoring {size}, of the rate"] = learned["scoring_tflops"] / rates["tflops"]
            rows[f"update {size}, of the rate"] = learned["update_tflops"] / rates["tflops"]
    layer = results.get("experts", {})
    if "tflops" in layer and "tflops" in rates:
        rows["experts, of the rate"] = layer["tflops"] / rates["tflops"]
    iteration = results.get("ppo 0.5b", {})
    if "s" in iteration:
        rows["PPO iteration 0.5b, s"] = iteration["s"]
        rows["first iteration, s"] = iteration["first_s"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--section", choices=SECTIONS, help="run one here, and print its JSON")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="which ones, with commas")
    parser.add_argument("--limit", type=float, default=60, help="seconds of a section")
    parser.add_argument("--peer-limit", type=float, default=180, help="seconds of a peer")
    parser.add_argument("--trl-python", default="", help="interpreter with torch and TRL 1.9")
    parser.add_argument("--tunix-python", default="", help="interpreter with Tunix")
    arguments = parser.parse_args()
    if arguments.section:
        print(json.dumps(run_section(arguments.section, arguments.tiny)))
        return
    results = {}
    size = ["--tiny"] if arguments.tiny else []
    for name in arguments.sections.split(","):
        command = [sys.executable, str(HERE / "gpu.py"), "--section", name, *size]
        results[name] = run_apart(command, arguments.limit)
        print(f"{name:12} {describe(results[name])}", flush=True)
    rows = shares(results)
    for name, value in rows.items():
        print(f"{name:40} {value:.4g}", flush=True)
    for peer, script in PEERS.items():
        python = getattr(arguments, f"{peer}_python")
        if python:
            words = [str(HERE / "peers" / script), "tiny" if arguments.tiny else "0.5b", "4"]
            results[peer] = peer_iteration([python, *words], arguments.peer_limit)
            print(f"{peer:12} {describe(results[peer])}", flush=True)
    print(json.dumps({"rows": rows, "sections": results}))


if __name__ == "__main__":
    main()
