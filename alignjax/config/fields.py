"""What a run is: the dataclasses that hold every default once."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(unsafe_hash=True)
class Model:
    """A decoder."""

    # The Hugging Face layout that weights are read from and written to.
    # qwen, qwen2, qwen3, qwen3_moe, llama, granite, olmo2, seed_oss, smollm3, mistral, gemma2,
    # gemma3_text, phi3
    family: str = "qwen2"
    vocab_size: int = 1024
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    head_size: int = 32
    d_ff: int = 352
    # Experts of `d_ff` in the place of each feed-forward network, and how many of them a router
    # chooses for a token, with weights of its softmax that normalise_experts makes sum to 1.
    experts: int = 0
    experts_per_token: int = 0
    normalise_experts: bool = False
    # Coefficient of the load-balancing loss of experts, see `experts.load_balancing`.
    load_balancing_coef: float = 0.0
    qkv_bias: bool = True
    out_bias: bool = False  # a bias of the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: str = "head"  # what one norm of qk_norm covers: head, width (all heads)
    # Where a layer's norms are: before or after attention and feed-forward, or both.
    norms: str = "before"
    norm_plus_one: bool = False  # norms multiply by 1 + their scale
    activation: str = "silu"  # of the feed-forward network's gate: silu, gelu_tanh
    tied: bool = False
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what a layer adds to its input
    attention_multiplier: float = 0.0  # of the attention's scores; 0 is 1 / sqrt(head_size)
    logits_divisor: float = 1.0
    attention_cap: float = 0.0  # scores become cap * tanh(scores / cap); 0 is no cap
    logits_cap: float = 0.0  # the same of the logits
    # The kinds of the layers, a list with commas that repeats until all layers have one: full,
    # window (sees the last `window` tokens, its own included), full_nope and window_nope (without
    # rotary positions).
    layer_types: str = "full"
    window: int = 0
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_window_theta: float = 0.0  # of layers with a window, without scaling; 0: like the others
    rope_share: float = 1.0  # of a head's numbers, the first of which are rotated
    # "", linear, llama3, yarn, and two whose frequencies depend on how long a sequence is: longrope
    # and dynamic.
    rope_scaling: str = ""
    rope_factor: float = 1.0
    rope_low_factor: float = 1.0  # llama3: low_freq_factor; yarn: beta_slow
    rope_high_factor: float = 4.0  # llama3: high_freq_factor; yarn: beta_fast
    rope_original_length: int = 8192
    rope_magnitude: float = 0.0  # yarn, longrope: of cosine and sine; 0 is that of their formulas
    # longrope: what divides the frequencies of sequences of up to rope_original_length tokens, and
    # of longer ones; lists with commas.
    rope_short_factors: str = ""
    rope_long_factors: str = ""
    max_length: int = 2048
    # Type of the computation. Parameters, softmax, log-probabilities and losses are float32.
    dtype: str = "float32"
    # What the backward pass recomputes: nothing, everything, dots (all else), or auto, the least
    # that fits the device's memory (nothing, on a CPU). config.json has the level that was chosen.
    remat: str = "nothing"
    attention: str = "auto"  # auto, xla, triton or cudnn (NVIDIA), splash (TPU)

    @property
    def rotary_size(self) -> int:
        """Return how many numbers of a head are rotated."""
        return int(self.head_size * self.rope_share)

    @property
    def rope_varies(self) -> bool:
        """Return whether RoPE differs between sequences that the model may read, by length."""
        return self.rope_scaling in ROPE_BY_LENGTH and self.max_length > self.rope_original_length


@dataclass
class Optimiser:
    """AdamW with global-norm clipping.

    The learning rate warms up linearly, then stays constant or follows a cosine to a tenth.
    """

    learning_rate: float = 1e-3
    schedule: str = "constant"  # constant, cosine
    warmup_steps: int = 0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0


@dataclass
class Data:
    """Where examples come from.

    A source is "toy/NAME", "tfds/NAME" or a path; commas separate several, see `data.mixture`.
    """

    kind: str = "text"  # lm: text, conversations; ranking, dpo: comparisons; ppo: prompts
    train: str = "toy/text"
    heldout: str = "toy/text"  # ranking and dpo report figures for each source separately
    # Share of prompts, by their hash, to hold out of a file that train and heldout both name.
    heldout_share: float = 0.0
    on_bad_row: str = "error"  # in a user's file: error, or skip (and count)
    # field of a row -> the name that it has in the files of train and heldout, if it is another
    columns: dict[str, str] = field(default_factory=dict)
    data_dir: str = ""  # where public sets were prepared; "" is the default of TFDS
    batch: int = 64  # examples (pairs, prompts) of an optimiser step (of a rollout, for PPO)
    max_length: int = 64  # tokens of an example; longer ones are dropped and counted, never cut
    examples: int = 0  # how many examples of each data set to use; 0 is all of them
    # How many examples of each held-out source are evaluated; 0 is all of them. None of their
    # prompts is trained on in either case.
    heldout_examples: int = 0


@dataclass
class Ranking:
    """The ranking loss of PMP and RM."""

    margin: bool = False  # subtract the margin of a comparison from the difference of scores
    centring: float = 0.0  # coefficient of (score_chosen + score_rejected)^2
    # Conversations whose mean score is brought to 0 after training, by a shift of the head's bias.
    demonstrations: str = ""


@dataclass
class Reward:
    """A source of the score of a response: an entry of `ppo.rewards`."""

    # A reward model (NAME.py, a run, a Hugging Face directory, hf://ORG/NAME), a function
    # module:function(prompts, responses, **columns) -> scores, or an endpoint http://... or
    # https://..., which answers a JSON call.
    source: str = ""
    weight: float = 1.0  # may be negative; with 0 the score is only logged
    normalise: str = "none"  # by running statistics of its own: none, mean, mean_std
    # For an endpoint: the most responses of a call, the seconds that it may take, and how often
    # it is repeated after a failed connection or the status 429 or 5xx.
    batch: int = 64
    timeout: float = 60.0
    retries: int = 6


@dataclass
class DPO:
    """Direct preference optimisation (Rafailov et al. 2023), which needs no reward model."""

    # Weighs the log-ratio of policy to reference: the larger, the closer they stay. tau of IPO.
    beta: float = 0.1
    loss: str = "sigmoid"  # sigmoid, ipo (Azar et al. 2023: squared, on log-ratios per token)
    label_smoothing: float = 0.0  # of sigmoid: the share of comparisons with the wrong label
    # Held-out prompts that both answer at the end, sampled as the fields of `ppo` say; "" is none.
    prompts: str = ""


@dataclass
class PPO:
    """Clipped PPO, section 3.2.2 of the report.

    (i) marks what the report does not state: the value is InstructGPT's.
    """

    samples_per_prompt: int = 2
    response_length: int = 24
    temperature: float = 1.0  # (i)
    top_p: float = 0.9
    kl_coef: float = 0.04
    # Where the KL penalty is: in each token's reward, or a term of the policy's loss.
    kl_in: str = "reward"
    # Estimate of a token's KL, see `losses.kl_estimate`: k1, k2, k3. In the loss: k2 or k3.
    kl_estimator: str = "k1"
    # KL to the reference, in nats a response, that adapts kl_coef; 0 leaves kl_coef as it is.
    kl_target: float = 0.0
    kl_horizon: int = 10000  # responses over which kl_coef adapts; more is slower
    clip: float = 0.2  # (i)
    clip_high: float = 0.0  # the ratio's upper bound is 1 + clip_high; 0 is clip
    # Bound on ratio x |advantage| where the advantage is negative, above 1; 0 is none.
    dual_clip: float = 0.0
    entropy_coef: float = 0.0  # of the entropy of a token's distribution, added to the objective
    # Weights of tokens in the policy's loss: token, sequence, constant; "" is the estimator's.
    loss_aggregation: str = ""
    value_clip: float = 0.15
    gamma: float = 1.0  # (i)
    lam: float = 0.95  # (i)
    value_lam: float = -1.0  # lambda of the value model's targets; -1 is lam
    epochs: int = 1  # (i)
    minibatches: int = 1
    value_warmup_steps: int = 50  # the first updates, which touch only the value model
    advantage_estimator: str = "gae"  # a name of `config.estimators`, or module:function
    sampler: str = ""  # module:function(params, prompts, key, settings) -> Rollout; "" is ours
    reward_fn: str = ""  # module:function(prompts, responses, **columns) -> scores
    reward_fn_weight: float = 1.0
    reward_weight: float = 1.0  # of the reward model's score, which is added to the function's
    # name -> source of a score; the score is their weighted sum. Instead of parents.reward,
    # reward_fn and the two weights.
    rewards: dict[str, Reward] = field(default_factory=dict)
    normalise_scores: str = "mean"  # by running statistics: none, mean, mean_std
    score_clip: float = 0.0  # bound on the absolute value of a normalised score; 0 is none
    whiten_advantages: bool = True
    truncated_score: float = -1.0  # replaces the raw score of a response that did not end
    # Tokens before response_length in which a response's raw score falls by overlong_penalty.
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    pretrain_data: str = "toy/text"  # cut in windows of data.max_length + response_length tokens
    pretrain_heldout: str = "toy/text"  # measures the alignment tax, before and after; "" is none
    pretrain_coef: float = 0.0
    pretrain_ratio: float = 0.0  # pretraining sequences for each response
    # Responses that are sampled at once; each that ends makes room for the next. 0 is all of them.
    slots: int = 0
    # Devices along mesh.tensor in sampling, the others along mesh.data; 0 is the mesh as it is.
    rollout_tensor: int = 0
    cache_dtype: str = ""  # of keys and values in sampling; "" is model.dtype
    frozen_dtype: str = ""  # of the reference's and reward model's matrices; "" is float32
    frozen_memory: str = "device"  # where they are kept: device, host (pinned, fetched on use)
    # Steps between evaluations on held-out prompts (evaluations.jsonl); 0 is only at the end.
    eval_every: int = 0
    # How many held-out prompts, in whole batches of data.batch, and windows of held-out text.
    eval_prompts: int = 64


@dataclass
class Lora:
    """Adapters of low rank, which are trained in the place of the parameters, if there are any.

    A product x W becomes x W + alpha / rank (x A) B. The base, which holds W, is frozen, and roles
    that have the same base share it. The head of a scalar role is trained in full.
    """

    rank: int = 0  # of A and B; 0 trains all parameters
    alpha: float = 16.0
    targets: str = "q,k,v,out,gate,up,down"  # the products that have adapters, of LORA_TARGETS
    # Whether a rollout samples from a copy of the base with the adapters added to it, rather than
    # from the base and the adapters as they are, which takes no copy and is slower.
    merge_for_rollout: bool = True


@dataclass
class Mesh:
    """Devices along each axis."""

    data: int = 1
    fsdp: int = -1  # -1 takes the devices that are left
    tensor: int = 1


@dataclass
class Config:
    """One run: a stage, its parents, and everything that determines its result."""

    stage: str = "lm"  # lm, ranking, dpo, ppo
    name: str = "lm"
    seed: int = 0
    # Optimiser steps; for PPO, rollouts. 0, not for PPO, is one pass over the examples.
    steps: int = 100
    # role -> config (NAME.py), run, Hugging Face directory, or hf://ORG/NAME, which is downloaded;
    # a checkpoint may have a PEFT adapter, BASE+ADAPTER
    parents: dict[str, str] = field(default_factory=dict)
    # A directory or hf://ORG/NAME; "" is the parents', or without parents one trained on the text.
    tokenizer: str = ""
    chat_template: str = ""  # "" is the tokenizer's own; chatml
    # Today for a chat template that writes the date, such as 2026-01-31; "" is the parents', else
    # the day on which the run begins. config.json has the day that was used.
    template_date: str = ""
    # Whether special tokens in the texts of the data are special, as in apply_chat_template, rather
    # than text. A child of a run does as its parent does.
    special_tokens_in_content: bool = False
    microbatch_tokens: int = 4096  # a minibatch is packed into microbatches of about so many tokens
    model: Model = field(default_factory=Model)
    optimiser: Optimiser = field(default_factory=Optimiser)
    value_optimiser: Optimiser = field(default_factory=Optimiser)
    data: Data = field(default_factory=Data)
    ranking: Ranking = field(default_factory=Ranking)
    dpo: DPO = field(default_factory=DPO)
    ppo: PPO = field(default_factory=PPO)
    lora: Lora = field(default_factory=Lora)
    mesh: Mesh = field(default_factory=Mesh)
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    # Steps whose loss or gradient is not finite, which are not applied; one more stops the run.
    max_skipped: int = 3
    sample_every: int = 10  # steps between entries of samples.jsonl


# The parents that each stage may have, the kinds of data that it takes, the values of fields.
ROLES = {
    "lm": {"model"},
    "ranking": {"model"},
    "dpo": {"policy", "reference"},
    "ppo": {"policy", "reference", "value", "reward"},
}
NORMALISATIONS = ("none", "mean", "mean_std")
KINDS = {
    "lm": ("text", "conversations"),
    "ranking": ("comparisons",),
    "dpo": ("comparisons",),
    "ppo": ("prompts",),
}
# The fields of a model that say how it is computed and trained, not what it computes.
RUNTIME_FIELDS = ("dtype", "remat", "attention", "load_balancing_coef")
# The kinds that `model.layer_types` may list.
LAYER_TYPES = ("full", "window", "full_nope", "window_nope")
# The kinds of `model.rope_scaling` whose frequencies depend on the length of a sequence.
ROPE_BY_LENGTH = ("dynamic", "longrope")
# The products of a layer that may have adapters, and the part of the layer that each is in.
LORA_TARGETS = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "out": "attention",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}
CHOICES = {
    "stage": tuple(ROLES),
    # `models.families.register` adds more.
    "model.family": (
        "qwen",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "llama",
        "granite",
        "olmo2",
        "seed_oss",
        "smollm3",
        "mistral",
        "gemma2",
        "gemma3_text",
        "phi3",
    ),
    "model.qk_norm_over": ("head", "width"),
    "model.norms": ("before", "after", "both"),
    "model.activation": ("silu", "gelu_tanh"),
    "model.rope_scaling": ("", "linear", "llama3", "yarn", *ROPE_BY_LENGTH),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("nothing", "everything", "dots", "auto"),
    "model.attention": ("auto", "xla", "triton", "cudnn", "splash"),
    "chat_template": ("", "chatml"),
    "data.on_bad_row": ("error", "skip"),
    "optimiser.schedule": ("constant", "cosine"),
    "value_optimiser.schedule": ("constant", "cosine"),
    "dpo.loss": ("sigmoid", "ipo"),
    "ppo.kl_in": ("reward", "loss"),
    "ppo.kl_estimator": ("k1", "k2", "k3"),
    "ppo.loss_aggregation": ("", "token", "sequence", "constant"),
    "ppo.normalise_scores": NORMALISATIONS,
    "ppo.cache_dtype": ("", "float32", "bfloat16"),
    "ppo.frozen_dtype": ("", "float32", "bfloat16"),
    "ppo.frozen_memory": ("device", "host"),
}


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) of every field; a dictionary is one value.

    The entries of a table, such as `ppo.rewards`, become dictionaries: {name: {field: value}}.
    """
    for config_field in dataclasses.fields(config):
        value = getattr(config, config_field.name)
        name = f"{prefix}{config_field.name}"
        if dataclasses.is_dataclass(value):
            yield from flatten(value, f"{name}.")
        elif isinstance(value, dict):
            yield name, {key: plain_entry(entry) for key, entry in value.items()}
        else:
            yield name, value


def plain_entry(entry: Any) -> Any:
    """Return an entry of a dictionary, and a dataclass as a dictionary of its fields."""
    is_group = dataclasses.is_dataclass(entry) and not isinstance(entry, type)
    return dict(vars(entry)) if is_group else entry


def entry_type(kind: Any) -> type | None:
    """Return the dataclass of a table's entries; None for the type of any other field."""
    if typing.get_origin(kind) is not dict:
        return None
    _, value_kind = typing.get_args(kind)
    return value_kind if dataclasses.is_dataclass(value_kind) else None


def field_types(group: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, type) of every field of a config."""
    for name, kind in typing.get_type_hints(group).items():
        if dataclasses.is_dataclass(kind):
            yield from field_types(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", kind


# The tables of a config: field -> the type of its entries.
TABLES = {name: entry_type(kind) for name, kind in field_types(Config) if entry_type(kind)}
