"""From a rollout to what PPO learns from.

Responses are packed into microbatches, the four roles read them, and their readings become
rewards, advantages and returns. In shapes, `responses` counts the responses of a rollout,
`members` those of a minibatch; `rows` and `width` are those of a packed microbatch.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from alignjax.algorithms.advantages import KLControl, RunningStats
from alignjax.algorithms.endings import Ending, closing_length, put_ending, tokens_unread
from alignjax.config import Config, Model
from alignjax.data import packing
from alignjax.machine import sharding
from alignjax.models import scoring
from alignjax.models.scoring import PackedTokens
from alignjax.sampling.types import Rollout
from alignjax.weights import roles

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ResponseMicrobatch:
    """How some responses of a rollout, with their prompts, are packed in rows; and the way back.

    The number of a response in the rollout stands for it. `members` lists the responses in the
    microbatch, then the count of all responses as padding.
    """

    sequence: Int[Array, "rows width"]  # response of each token; -1 on pads
    place: Int[Array, "rows width"]  # of each token in its prompt and response
    # Places of the tokens of responses in each device's rows, see `scoring.at_targets`.
    targets: Int[Array, "shards targets"]
    # 1 / tokens of the minibatch on targets, 0 on padding: they sum to 1 over the minibatch.
    weights: Float[Array, "shards targets"]
    members: Int[Array, " members"]
    # Places in the flattened rows of the last token of each member, or of the last of those behind
    # it that only reward models read.
    ends: Int[Array, " members"]
    # Place of each token of a member in the flattened targets.
    source: Int[Array, "members tokens"]


@dataclass(frozen=True, kw_only=True)
class TokenReward:
    """A reward model that reads the policy's own tokens."""

    name: str  # of its score
    role: str  # of its parameters
    model: Model  # its architecture, which may be another than the policy's
    ending: Ending = None  # of what it reads


TokenRewards = tuple[TokenReward, ...]


def tokens_behind(readers: TokenRewards) -> int:
    """Return how many tokens behind a response need room: what the longest ending has there."""
    return max((closing_length(reader.ending) for reader in readers), default=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the four roles make of each response: per token, but for the score."""

    logprobs: Float[Array, "responses tokens"]  # of the policy
    entropy: Float[Array, "responses tokens"]  # of the policy
    ref_logprobs: Float[Array, "responses tokens"]
    values: Float[Array, "responses tokens"] | None  # before each token; None: no value model
    scores: dict[str, Float[Array, " responses"]]  # raw, by the name of their source


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Experience:
    """What the updates of one rollout learn from: fixed before the first of them."""

    rollout: Rollout
    old_logprobs: Float[Array, "responses tokens"]  # of the policy that sampled, by the scorer
    advantages: Float[Array, "responses tokens"]  # whitened over the whole rollout
    # Of the value model: None without one.
    old_values: Float[Array, "responses tokens"] | None = None
    returns: Float[Array, "responses tokens"] | None = None  # before whitening
    # Of a KL penalty in the loss: None if the penalty is in the rewards.
    ref_logprobs: Float[Array, "responses tokens"] | None = None
    kl_coef: Float[Array, ""] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class ScoredRollout:
    """A rollout's experience and what is logged of it."""

    experience: Experience
    stats: RunningStats  # with the scores of this rollout
    source_stats: dict[str, RunningStats]  # of the scores of each entry of `ppo.rewards`
    scores: dict[str, Float[Array, " responses"]]  # raw, by the name of their source
    kl_control: KLControl | None = None  # for the next rollout; None: `ppo.kl_coef` is fixed
    metrics: Metrics
    # score, kl, entropy, length, truncated, and score/NAME of each entry of `ppo.rewards`, each
    # [responses]; log_ratio [responses tokens], the log-probability of the policy less that of
    # the reference.
    responses: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LearningBatch:
    """The tokens of a microbatch and the fixed parts of its targets, each [shards targets]."""

    packed: PackedTokens
    targets: Int[Array, "shards targets"]
    weights: Float[Array, "shards targets"]
    lengths: Int[Array, "shards targets"]  # of the response that each target belongs to
    old_logprobs: Float[Array, "shards targets"]
    advantages: Float[Array, "shards targets"]
    old_values: Float[Array, "shards targets"] | None
    returns: Float[Array, "shards targets"] | None
    ref_logprobs: Float[Array, "shards targets"] | None
    kl_coef: Float[Array, ""] | None


def longest_sequence(config: Config) -> int:
    """Return the most tokens that a prompt and its response can have.

    A window of text for the pretraining gradient has as many.
    """
    return config.data.max_length + config.ppo.response_length


def pack_minibatch(
    config: Config,
    prompt_lengths: np.ndarray,
    lengths: np.ndarray,
    responses: np.ndarray,
    row_shards: int,
    behind: int = 0,
    ladder: packing.Ladder = packing.fine,
) -> list[ResponseMicrobatch]:
    """Pack the responses of a minibatch into microbatches, as host arrays.

    Behind a response there is room for the tokens that only reward models read. No token of the
    prompt or the response sees them, so the other roles read as if they were not there.

    Args:
      config: its lengths and `microbatch_tokens` decide on the shapes.
      prompt_lengths: of all responses of the rollout.
      lengths: of all responses of the rollout.
      responses: numbers of the minibatch's responses.
      row_shards: devices that the rows of a microbatch lie over.
      behind: tokens that only reward models read, see `tokens_behind`.
      ladder: the shapes of microbatches.
    """
    response_length = config.ppo.response_length
    layouts = packing.pack(
        prompt_lengths + lengths + behind,
        [[response] for response in responses],
        longest_sequence(config) + behind,
        config.microbatch_tokens,
        row_shards,
        ladder,
        counts=lengths,
    )
    token_count = lengths[responses].sum()
    microbatches = []
    for layout in layouts:
        response_place = layout.place - prompt_lengths[layout.sequence]
        is_response = (response_place >= 0) & (response_place < lengths[layout.sequence])
        is_target = layout.real & is_response
        targets, real = packing.targets(is_target, row_shards, layout.target_room)
        owner = packing.at_targets(layout.sequence, targets)[real]
        place = packing.at_targets(response_place, targets)[real]
        source = np.zeros((len(layout.members), response_length), np.int32)
        source[np.searchsorted(layout.members, owner), place] = np.flatnonzero(real)
        microbatch = ResponseMicrobatch(
            sequence=layout.sequence,
            place=layout.place,
            targets=targets,
            weights=real.astype(np.float32) / token_count,
            members=packing.padded(layout.members, len(responses), len(lengths)),
            ends=packing.padded(layout.ends(), len(responses), 0),
            source=packing.padded(source, len(responses), 0),
        )
        microbatches.append(microbatch)
    return microbatches


def empty_microbatch(config: Config, shape: packing.Shape, row_shards: int) -> ResponseMicrobatch:
    """Return a microbatch of a shape without any response, as host arrays."""
    ppo = config.ppo
    count = len(range(config.data.batch * ppo.samples_per_prompt)[:: ppo.minibatches])
    tokens = np.zeros((shape.rows, shape.width), np.int32)
    targets = np.zeros((row_shards, shape.targets), np.int32)
    members = np.zeros(count, np.int32)
    return ResponseMicrobatch(
        sequence=tokens - 1,
        place=tokens,
        targets=targets,
        weights=targets.astype(np.float32),
        members=members,
        ends=members,
        source=np.zeros((count, ppo.response_length), np.int32),
    )


def reward_tokens(
    packed: PackedTokens, rollout: Rollout, microbatch: ResponseMicrobatch, ending: Ending
) -> PackedTokens:
    """Return the tokens of a microbatch as the reward model reads them."""
    if ending is None:
        return packed
    owner = jnp.maximum(microbatch.sequence, 0)
    last_place = rollout.prompt_lengths + rollout.lengths - 1
    behind = microbatch.place - last_place[owner]
    tokens = put_ending(packed.tokens, behind, rollout.truncated[owner], ending)
    tokens = jnp.where(microbatch.sequence >= 0, tokens, 0)
    return sharding.constrain(dataclasses.replace(packed, tokens=tokens))


def pack_tokens(rollout: Rollout, microbatch: ResponseMicrobatch) -> PackedTokens:
    """Gather the tokens of a microbatch from the rollout."""
    owner = jnp.maximum(microbatch.sequence, 0)
    real = microbatch.sequence >= 0
    prompt_width = rollout.tokens.shape[1] - rollout.logprobs.shape[1]
    start = prompt_width - rollout.prompt_lengths
    tokens = rollout.tokens[owner, start[owner] + microbatch.place]
    packed = PackedTokens(
        tokens=jnp.where(real, tokens, 0),
        positions=microbatch.place,
        segments=microbatch.sequence + 1,
    )
    return sharding.constrain(packed)


def score_places(
    microbatch: ResponseMicrobatch, ending: Ending, behind: int
) -> Int[Array, " members"]:
    """Return where a reward model with this ending reads its scores, in the flattened rows.

    `behind` is the number of tokens for which there is room behind each response.
    """
    earlier = behind - closing_length(ending) + tokens_unread(ending)
    return jnp.maximum(microbatch.ends - earlier, 0) if earlier else microbatch.ends


def read_roles(
    config: Config,
    readers: TokenRewards,
    params: dict[str, dict],
    rollout: Rollout,
    reading: Reading,
    microbatch: ResponseMicrobatch,
) -> Reading:
    """Return the reading with what the roles make of the responses of a microbatch.

    `params` maps roles to parameters. The reward models among `readers` may have another
    architecture than the other roles. Those that read other tokens are not among them, and their
    scores are already in `reading`. Padding members write nowhere.
    """
    model = config.model
    temperature = config.ppo.temperature
    packed = pack_tokens(rollout, microbatch)
    targets = sharding.constrain(microbatch.targets)
    reference = roles.on_device(params["reference"])
    logprobs, entropy = scoring.token_logprobs(
        model, params["policy"], packed, targets, temperature
    )
    ref_logprobs, _ = scoring.token_logprobs(model, reference, packed, targets, temperature)
    values = None
    if "value" in params:
        values = scoring.token_values(model, params["value"], packed, targets)
    scores = dict(reading.scores)
    for reader in readers:
        own_scores = scoring.sequence_scores(
            reader.model,
            roles.on_device(params[reader.role]),
            reward_tokens(packed, rollout, microbatch, reader.ending),
            score_places(microbatch, reader.ending, tokens_behind(readers)),
        )
        old_scores = scores[reader.name]
        scores[reader.name] = old_scores.at[microbatch.members].set(own_scores, mode="drop")

    def put(old: jax.Array | None, new: jax.Array | None) -> jax.Array | None:
        if old is None:
            return None
        by_member = new.reshape(-1)[microbatch.source]
        return old.at[microbatch.members].set(by_member, mode="drop")

    return Reading(
        logprobs=put(reading.logprobs, logprobs),
        entropy=put(reading.entropy, entropy),
        ref_logprobs=put(reading.ref_logprobs, ref_logprobs),
        values=put(reading.values, values),
        scores=scores,
    )


def response_figures(rollout: Rollout, reading: Reading) -> dict[str, jax.Array]:
    """Return what is reported of each response beside its scores.

    They are kl, entropy, length and truncated, each [responses], and log_ratio [responses tokens],
    the log-probability of the policy less that of the reference.
    """
    log_ratio = jnp.where(rollout.mask, reading.logprobs - reading.ref_logprobs, 0.0)
    return {
        "kl": log_ratio.sum(1),
        "entropy": jnp.where(rollout.mask, reading.entropy, 0.0).sum(1),
        "length": rollout.lengths,
        "truncated": rollout.truncated,
        "log_ratio": log_ratio,
    }


def select_targets(experience: Experience, microbatch: ResponseMicrobatch) -> LearningBatch:
    """Gather the tokens of a microbatch and what the losses compare them with."""
    owner = scoring.at_targets(microbatch.sequence, microbatch.targets)
    place = scoring.at_targets(microbatch.place, microbatch.targets)
    owner = jnp.maximum(owner, 0)
    response_place = jnp.maximum(place - experience.rollout.prompt_lengths[owner], 0)

    def gather(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else sharding.constrain(array[owner, response_place])

    return LearningBatch(
        packed=pack_tokens(experience.rollout, microbatch),
        targets=sharding.constrain(microbatch.targets),
        weights=sharding.constrain(microbatch.weights),
        lengths=sharding.constrain(experience.rollout.lengths[owner]),
        old_logprobs=gather(experience.old_logprobs),
        advantages=gather(experience.advantages),
        old_values=gather(experience.old_values),
        returns=gather(experience.returns),
        ref_logprobs=gather(experience.ref_logprobs),
        kl_coef=experience.kl_coef,
    )


def on_host(scored: ScoredRollout) -> dict[str, np.ndarray]:
    """Return a scored rollout as host arrays by name, to compute its losses again.

    The names are those of the fields of `Rollout` and `Experience`, as far as the run has them,
    and the figures of the responses.
    """
    experience = scored.experience
    arrays = dict(scored.responses)
    for part in (experience, experience.rollout):
        arrays |= {field.name: getattr(part, field.name) for field in fields(part)}
    del arrays["rollout"]
    return {name: sharding.on_host(array) for name, array in arrays.items() if array is not None}


def from_host(arrays: dict[str, np.ndarray]) -> Experience:
    """Return the experience that `on_host` took apart."""
    rollout = Rollout(**{field.name: arrays[field.name] for field in fields(Rollout)})
    names = [field.name for field in fields(Experience) if field.name in arrays]
    return Experience(rollout=rollout, **{name: arrays[name] for name in names})


class Minibatches:
    """The minibatches of a rollout, each as packed microbatches on the mesh.

    The first epoch's are packed once: the scorer reads the very arrays that the first updates
    read, so the first ratio is 1. (A matrix product rounds a row according to its neighbours.)
    """

    def __init__(
        self,
        config: Config,
        mesh: jax.sharding.Mesh,
        prompt_lengths: np.ndarray,
        lengths: np.ndarray,
        behind: int = 0,
        ladder: packing.Ladder = packing.fine,
    ):
        self.config = config
        self.ladder = ladder
        self.behind = behind
        self.mesh = mesh
        self.prompt_lengths = prompt_lengths
        self.lengths = lengths
        count = config.ppo.minibatches
        all_responses = np.arange(len(lengths))
        self.first_epoch = [self.pack(all_responses[first::count]) for first in range(count)]

    def pack(self, responses: np.ndarray) -> list[ResponseMicrobatch]:
        """Pack some responses into microbatches on the mesh."""
        microbatches = pack_minibatch(
            self.config,
            self.prompt_lengths,
            self.lengths,
            responses,
            sharding.row_shards(self.mesh),
            self.behind,
            self.ladder,
        )
        return sharding.shard_batch(microbatches, self.mesh)

    def get(self, place: int, responses: np.ndarray) -> list[ResponseMicrobatch]:
        """Return the minibatch at a place of the step's order, which holds these responses."""
        if place < len(self.first_epoch):
            return self.first_epoch[place]
        return self.pack(responses)


def empty_reading(
    rollout: Rollout,
    scores: dict[str, np.ndarray],
    names: Iterable[str],
    mesh: jax.sharding.Mesh,
    *,
    has_value: bool = True,
) -> Reading:
    """Return a reading of zeros, with the scores that text-based rewards have given.

    `names` are the sources of scores, those that are still to be read included.
    """
    shape = rollout.logprobs.shape
    zeros = np.zeros(shape, np.float32)
    reading = Reading(
        logprobs=zeros,
        entropy=zeros,
        ref_logprobs=zeros,
        values=zeros if has_value else None,
        scores={name: scores.get(name, zeros[:, 0]) for name in names},
    )
    return sharding.shard_batch(reading, mesh)
