"""Run google-tunix 0.1.7's PPOLearner, vanilla rollout, at the shapes of trl_ppo.py.

usage: python tunix_ppo.py [tiny|small|0.5b] [iterations] [match|accum|stock] [mean length]

0.5b is the shape of Qwen2.5-0.5B with untied embeddings, for a GPU, in bfloat16 with float32
masters.

The model is a small random Qwen2 in float32 on the CPU. With a mean length, responses end at
random: the end token gets that chance at every place, whatever came before.

match: one rollout of 32, then 4 minibatches of 8, an optimiser step each, as TRL does. Tunix has
       no setting for this, because it makes a rollout for each mini_batch_size. So the trainers are
       built for minibatches of 8, and then the learner is given 32 in 4 microbatches.
accum: Tunix's own nearest setting with one rollout of 32: 4 microbatches of 8, accumulated into 1
       optimiser step.
stock: a full batch of 32, mini_batch_size 8, nothing patched: 4 x (rollout of 8, optimiser step).

The last line has every iteration after the two that compile, and of the median iteration the tokens
a second and the time by phase.
"""

import collections
import sys
import time
import warnings
from dataclasses import dataclass

warnings.filterwarnings("ignore")
import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.interpreters import pxla
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster
from tunix.rl import utils as rl_utils
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

absl.logging.set_verbosity(absl.logging.ERROR)


@dataclass(frozen=True, kw_only=True)
class Size:
    width: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    prompts: int = 32
    prompt_tokens: int = 32
    response_tokens: int = 64
    dtype: str = "float32"


SIZES = {
    "tiny": Size(width=128, feed_forward=344, layers=4, heads=4, kv_heads=4, vocabulary=512),
    "small": Size(width=512, feed_forward=1376, layers=8, heads=8, kv_heads=8, vocabulary=8192),
    "0.5b": Size(
        width=896,
        feed_forward=4864,
        layers=24,
        heads=14,
        kv_heads=2,
        vocabulary=151936,
        prompts=64,
        prompt_tokens=256,
        response_tokens=256,
        dtype="bfloat16",
    ),
}
END = 1
COMPILING = 2  # iterations
# Methods of the cluster whose time is taken.
PHASES = (
    "generate",
    "get_old_per_token_logps",
    "get_ref_per_token_logps",
    "get_values",
    "get_rewards",
    "update_actor",
    "update_critic",
)

size_name = sys.argv[1] if len(sys.argv) > 1 else "small"
iterations = int(sys.argv[2]) if len(sys.argv) > 2 else 6
mode = sys.argv[3] if len(sys.argv) > 3 else "match"
mean_length = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
size = SIZES[size_name]
PROMPTS = size.prompts
PROMPT_TOKENS = size.prompt_tokens
RESPONSE_TOKENS = size.response_tokens
MINIBATCH = PROMPTS // 4
config = qwen2.ModelConfig(
    num_layers=size.layers,
    vocab_size=size.vocabulary,
    embed_dim=size.width,
    hidden_dim=size.feed_forward,
    num_heads=size.heads,
    head_dim=size.width // size.heads,
    num_kv_heads=size.kv_heads,
    rope_theta=10000,
    norm_eps=1e-6,
    **({} if size.dtype == "float32" else {"dtype": jnp.dtype(size.dtype)}),
)


def build(seed):
    """Return a Qwen2 with every matrix drawn from N(0, 0.02), as transformers does.

    Tunix's own initialisation leaves the MLP at zero.
    """
    model = qwen2.Qwen2(config, rngs=nnx.Rngs(seed))
    keys = iter(jax.random.split(jax.random.key(seed), 1000))

    def draw(array):
        return 0.02 * jax.random.normal(next(keys), array.shape) if array.ndim > 1 else array

    nnx.update(model, jax.tree.map(draw, nnx.state(model, nnx.Param)))
    return model


unbiased_call = qwen2.Qwen2.__call__


def favour_end(self, *arguments, **options):
    """Call the model, and give the end token a chance of (about) 1 / mean_length."""
    results = unbiased_call(self, *arguments, **options)
    if not isinstance(results, tuple) or results[0].shape[-1] != size.vocabulary:
        return results
    logits, *others = results
    odds = np.log(size.vocabulary / (mean_length - 1))
    biased = logits + odds * (jnp.arange(size.vocabulary) == END)
    return tuple([biased, *others])


if mean_length:
    qwen2.Qwen2.__call__ = favour_end


class Tokens:
    """A tokenizer whose text is ids in decimal, separated by spaces; id 0 pads."""

    def encode(self, text):
        return [int(number) for number in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def bos_id(self):
        return None

    def eos_id(self):
        return END

    def pad_id(self):
        return 0


seconds_of_phases = collections.Counter()  # in the iteration at work
iteration_seconds = []
iteration_phases = []


def time_method(owner, name):
    """Add the time of a method's calls to `seconds_of_phases`."""
    method = getattr(owner, name)

    def timed(*arguments, **options):
        start = time.perf_counter()
        result = jax.block_until_ready(method(*arguments, **options))
        seconds_of_phases[name] += time.perf_counter() - start
        return result

    setattr(owner, name, timed)


class TimedLearner(PPOLearner):
    def _run_global_step(self, *arguments, **options):
        seconds_of_phases.clear()
        start = time.perf_counter()
        super()._run_global_step(*arguments, **options)
        iteration_seconds.append(time.perf_counter() - start)
        iteration_phases.append(dict(seconds_of_phases))


actor = build(0)
reference = build(0)
critic = rl_utils.create_critic_model(build(1), seed=1)
reward = rl_utils.create_critic_model(build(2), seed=2)
print(
    "params",
    sum(array.size for array in jax.tree.leaves(nnx.state(actor, nnx.Param))),
    "jax",
    jax.__version__,
    jax.devices(),
    flush=True,
)
mesh = pxla.thread_resources.env.physical_mesh
minibatches = PROMPTS // MINIBATCH
if mode == "accum":
    batches = dict(mini_batch_size=PROMPTS, train_micro_batch_size=MINIBATCH)
else:
    batches = dict(mini_batch_size=MINIBATCH)
rollout = MINIBATCH if mode == "stock" else PROMPTS
training = rl_cluster.RLTrainingConfig(
    actor_optimizer=optax.adamw(3e-6),
    critic_optimizer=optax.adamw(3e-6),
    eval_every_n_steps=10**9,
    max_steps=iterations * (1 if mode == "accum" else minibatches),
    rollout_micro_batch_size=rollout,
    compute_logps_micro_batch_size=rollout,
    **batches,
)
cluster = rl_cluster.RLCluster(
    actor=actor,
    critic=critic,
    reference=reference,
    reward=reward,
    tokenizer=Tokens(),
    cluster_config=rl_cluster.ClusterConfig(
        role_to_mesh={role: mesh for role in rl_cluster.Role},
        training_config=training,
        rollout_config=RolloutConfig(
            max_tokens_to_generate=RESPONSE_TOKENS,
            max_prompt_length=PROMPT_TOKENS,
            kv_cache_size=PROMPT_TOKENS + RESPONSE_TOKENS,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[END if mean_length else -1],
        ),
    ),
)
if mode == "match":
    training.mini_batch_size = PROMPTS
    training.train_micro_batch_size = MINIBATCH
    training.gradient_accumulation_steps = minibatches
learner = TimedLearner(cluster, PPOConfig(num_iterations=1, beta=0.04))
for name in PHASES:
    time_method(cluster, name)
random = np.random.default_rng(1)


def random_prompt():
    return " ".join(map(str, random.integers(2, size.vocabulary, PROMPT_TOKENS)))


learner.train(
    [{"prompts": np.array([random_prompt() for _ in range(PROMPTS)])} for _ in range(iterations)]
)
seconds = iteration_seconds[COMPILING:]
median = sorted(seconds)[len(seconds) // 2]
phases = iteration_phases[COMPILING + seconds.index(median)]
print(
    "tunix_ppo",
    size_name,
    mode,
    "first",
    [round(value, 1) for value in iteration_seconds[:COMPILING]],
    "seconds_per_iteration",
    [round(value, 2) for value in seconds],
    "min",
    round(min(seconds), 3),
    "median",
    round(median, 3),
    "response_tokens_per_s",
    round(PROMPTS * RESPONSE_TOKENS / median, 1),
    "phases",
    {name.replace("_per_token", ""): round(value, 2) for name, value in phases.items()},
)
