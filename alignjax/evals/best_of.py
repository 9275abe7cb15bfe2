"""Answer by the best of n responses under a reward model: the baseline that RLHF is to beat.

    policy = inference.load("runs/sft")
    reward = inference.load("runs/rm")
    answers = best_of.generate(policy, reward, ["copy : cat box"], n=16)
    print(answers[0].response.text, answers[0].score, best_of.kl_bound(16))

The policy samples n responses to a prompt, and the one with the highest score is the answer. A
response that was cut off is taken only if all of them were: in PPO it would get
`ppo.truncated_score` whatever it says. Nothing is trained, so it costs n times as much to answer.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from alignjax.algorithms import rewards
from alignjax.config import UserError
from alignjax.data import chat
from alignjax.data.ends import replace_end
from alignjax.evals.requests import Candidate, ResponseSettings
from alignjax.inference import LoadedModel, Prompt, Response

MICROBATCH_TOKENS = 4096  # that the reward model reads at once
# As PPO samples: for tasks that are greedy otherwise, where all responses would be the same.
TEMPERATURE = 1.0
TOP_P = 0.9


@dataclass(frozen=True, kw_only=True)
class BestResponse:
    """The best of several responses to a prompt."""

    response: Response
    score: float  # of the response, by the reward model
    scores: tuple[float, ...]  # of all candidates, in the order in which they were sampled


def kl_bound(n: int) -> float:
    """Return the KL of best-of-n to the policy that it samples from, in nats a response.

    This is an upper bound, log n - (n - 1) / n, which is reached if every response is rare and no
    two have one score (Stiennon et al. 2020; that it is a bound: Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def check(n: int, temperature: float) -> None:
    """Raise UserError unless n responses can be sampled, and can differ."""
    if n < 1:
        raise UserError(f"best of {n}: there must be at least 1 response")
    if n > 1 and temperature == 0:
        raise UserError(f"best of {n}: temperature={temperature} gives {n} times the same response")


def generate(
    policy: LoadedModel,
    reward: LoadedModel,
    prompts: Sequence[Prompt],
    *,
    n: int = 16,
    temperature: float = 1.0,
    top_p: float = 0.9,
    max_tokens: int | None = None,
    seed: int = 0,
    slots: int = 64,
    microbatch_tokens: int = MICROBATCH_TOKENS,
) -> list[BestResponse]:
    """Return the best of n responses of the policy to each prompt under the reward model.

    The candidates are those of `LoadedModel.generate` with `samples=n`, which explains the other
    arguments. The reward model may have another tokenizer and template than the policy.

    Raises UserError as `generate` does, and for a reward model that is a language model.
    """
    check(n, temperature)
    responses = policy.generate(
        prompts,
        temperature=temperature,
        top_p=top_p,
        samples=n,
        max_tokens=max_tokens,
        seed=seed,
        slots=slots,
    )
    scores = reward.score(
        [prompt for prompt in prompts for _ in range(n)],
        [as_read_by(reward, policy, response) for response in responses],
        microbatch_tokens=microbatch_tokens,
    )
    by_prompt = np.array(scores).reshape(len(prompts), n)
    truncated = np.array([response.truncated for response in responses], bool)
    best = best_places(by_prompt, truncated.reshape(by_prompt.shape))
    return [
        BestResponse(
            response=responses[number * n + place],
            score=float(by_prompt[number, place]),
            scores=tuple(by_prompt[number].tolist()),
        )
        for number, place in enumerate(best)
    ]


def best_places(
    scores: Float[np.ndarray, "prompts n"], truncated: Bool[np.ndarray, "prompts n"]
) -> Int[np.ndarray, " prompts"]:
    """Return the place of the best response to each prompt, the first of equally good ones.

    A truncated response is worse than all that ended.
    """
    none_ended = truncated.all(axis=1, keepdims=True)
    return np.where(truncated & ~none_ended, -np.inf, scores).argmax(axis=1)


def as_read_by(reward: LoadedModel, policy: LoadedModel, response: Response) -> str | list[int]:
    """Return a policy's response as `LoadedModel.score` of a reward model takes it.

    It is the tokens that were sampled if both models make the same tokens of a conversation, as
    in PPO, and otherwise the text.
    """
    reads_same_tokens = policy.uses_chat_template and rewards.same_tokens(
        policy.tokenizer, reward.tokenizer
    )
    if not reads_same_tokens:
        return response.text
    if response.truncated:
        return response.tokens
    # The policy may have ends that the reward model does not know.
    return replace_end(response.tokens, [chat.end_token(reward.tokenizer)])


@dataclass(frozen=True, kw_only=True)
class BestOf:
    """How the answers of an evaluation are chosen: the best of n under a reward model."""

    n: int
    reward: LoadedModel

    def settings(self, settings: ResponseSettings) -> ResponseSettings:
        """Return the settings for the candidates; those of a greedy task are PPO's."""
        if settings.temperature == 0:
            settings = dataclasses.replace(settings, temperature=TEMPERATURE, top_p=TOP_P)
        return dataclasses.replace(settings, samples=self.n)

    def choose(self, prompt: Prompt, candidates: Sequence[Candidate]) -> str:
        """Return the text of the best response; of a long prompt the end is read."""
        texts = [candidate.text for candidate in candidates]
        scores = self.reward.score([prompt] * len(texts), texts, cut_beginning=True)
        truncated = np.array([[candidate.truncated for candidate in candidates]])
        (best,) = best_places(np.array([scores]), truncated)
        return texts[best]
