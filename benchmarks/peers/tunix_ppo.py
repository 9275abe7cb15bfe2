"""Peer baseline: google-tunix 0.1.7's PPOLearner, vanilla rollout, on a small random Qwen2 (fp32, CPU), at trl_ppo.py's shapes.

usage: python tunix_ppo.py [tiny|small] [iterations] [match|accum|stock] [mean length]
With a mean length, responses end at random: the end token gets that chance at every place, whatever came before.
match: one rollout of 32, then 4 minibatches of 8 with an optimizer step each, as TRL does. Tunix has no setting for this (it rolls
       out once per mini_batch_size), so the trainers are built for minibatches of 8 and the learner is then told 32 in 4 micro-batches.
accum: Tunix's own nearest setting with one rollout of 32: 4 micro-batches of 8 accumulated into 1 optimizer step.
stock: full batch 32, mini_batch_size 8, nothing patched: 4 x (rollout of 8, optimizer step).
The last line has every iteration after the two that compile, the median's tokens/s and that run's time by phase.
"""

import collections
import sys
import time
import warnings

warnings.filterwarnings("ignore")
import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.interpreters import pxla
from tunix.models.qwen2 import model as qwen2
from tunix.rl import rl_cluster as rc
from tunix.rl import utils as rl_utils
from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

absl.logging.set_verbosity(absl.logging.ERROR)

SIZES = {"tiny": (128, 344, 4, 4, 512), "small": (512, 1376, 8, 8, 8192)}
size = sys.argv[1] if len(sys.argv) > 1 else "small"
iters = int(sys.argv[2]) if len(sys.argv) > 2 else 6
mode = sys.argv[3] if len(sys.argv) > 3 else "match"
mean = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
QUERIES, PROMPT, RESPONSE, MINI = 32, 32, 64, 8
hidden, ffn, layers, heads, vocab = SIZES[size]
cfg = qwen2.ModelConfig(
    num_layers=layers,
    vocab_size=vocab,
    embed_dim=hidden,
    hidden_dim=ffn,
    num_heads=heads,
    head_dim=hidden // heads,
    num_kv_heads=heads,
    rope_theta=10000,
    norm_eps=1e-6,
)


def build(seed):
    """A Qwen2 with every matrix N(0, 0.02), as transformers does; Tunix's own init leaves the MLP at zero."""
    m = qwen2.Qwen2(cfg, rngs=nnx.Rngs(seed))
    keys = iter(jax.random.split(jax.random.key(seed), 1000))
    nnx.update(
        m,
        jax.tree.map(
            lambda x: 0.02 * jax.random.normal(next(keys), x.shape) if x.ndim > 1 else x,
            nnx.state(m, nnx.Param),
        ),
    )
    return m


if mean:
    plain, odds = qwen2.Qwen2.__call__, np.log(vocab / (mean - 1))

    def biased(self, *a, **k):
        out = plain(self, *a, **k)
        if not isinstance(out, tuple) or out[0].shape[-1] != vocab:
            return out
        return (out[0] + odds * (jnp.arange(vocab) == 1), *out[1:])

    qwen2.Qwen2.__call__ = biased


class Tokens:
    """Text is ids in decimal, separated by spaces; id 0 pads."""

    def encode(self, s):
        return [int(t) for t in s.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def bos_id(self):
        return None

    def eos_id(self):
        return 1

    def pad_id(self):
        return 0


spent, stamps, log = collections.Counter(), [], []


def clock(owner, name, label):
    f = getattr(owner, name)

    def timed(*a, **k):
        t = time.perf_counter()
        out = jax.block_until_ready(f(*a, **k))
        spent[label] += time.perf_counter() - t
        return out

    setattr(owner, name, timed)


class Timed(PPOLearner):
    def _run_global_step(self, *a, **k):
        spent.clear()
        t = time.perf_counter()
        super()._run_global_step(*a, **k)
        stamps.append(time.perf_counter() - t)
        log.append(dict(spent))


actor, ref = build(0), build(0)
critic, reward = (
    rl_utils.create_critic_model(build(1), seed=1),
    rl_utils.create_critic_model(build(2), seed=2),
)
print(
    "params",
    sum(x.size for x in jax.tree.leaves(nnx.state(actor, nnx.Param))),
    "jax",
    jax.__version__,
    jax.devices(),
    flush=True,
)
mesh = pxla.thread_resources.env.physical_mesh
batches = (
    dict(mini_batch_size=QUERIES, train_micro_batch_size=MINI)
    if mode == "accum"
    else dict(mini_batch_size=MINI)
)
rollout = MINI if mode == "stock" else QUERIES
train = rc.RLTrainingConfig(
    actor_optimizer=optax.adamw(3e-6),
    critic_optimizer=optax.adamw(3e-6),
    eval_every_n_steps=10**9,
    max_steps=iters * (1 if mode == "accum" else QUERIES // MINI),
    rollout_micro_batch_size=rollout,
    compute_logps_micro_batch_size=rollout,
    **batches,
)
cluster = rc.RLCluster(
    actor=actor,
    critic=critic,
    reference=ref,
    reward=reward,
    tokenizer=Tokens(),
    cluster_config=rc.ClusterConfig(
        role_to_mesh={r: mesh for r in rc.Role},
        training_config=train,
        rollout_config=RolloutConfig(
            max_tokens_to_generate=RESPONSE,
            max_prompt_length=PROMPT,
            kv_cache_size=PROMPT + RESPONSE,
            temperature=1.0,
            top_p=1.0,
            eos_tokens=[1 if mean else -1],
        ),
    ),
)
if mode == "match":
    train.mini_batch_size, train.train_micro_batch_size, train.gradient_accumulation_steps = (
        QUERIES,
        MINI,
        QUERIES // MINI,
    )
learner = Timed(cluster, PPOConfig(num_iterations=1, beta=0.04))
for name in (
    "generate",
    "get_old_per_token_logps",
    "get_ref_per_token_logps",
    "get_values",
    "get_rewards",
    "update_actor",
    "update_critic",
):
    clock(cluster, name, name)
g = np.random.default_rng(1)
learner.train(
    [
        {
            "prompts": np.array(
                [" ".join(map(str, g.integers(2, vocab, PROMPT))) for _ in range(QUERIES)]
            )
        }
        for _ in range(iters)
    ]
)
d = stamps[2:]
mid = sorted(d)[len(d) // 2]
print(
    "tunix_ppo",
    size,
    mode,
    "first",
    [round(x, 1) for x in stamps[:2]],
    "seconds_per_iteration",
    [round(x, 2) for x in d],
    "min",
    round(min(d), 3),
    "median",
    round(mid, 3),
    "response_tokens_per_s",
    round(QUERIES * RESPONSE / mid, 1),
    "phases",
    {k.replace("_per_token", ""): round(v, 2) for k, v in log[2 + d.index(mid)].items()},
)
