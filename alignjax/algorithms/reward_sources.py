"""The functions and endpoints that score texts, each tried before anything takes time."""

from transformers import PreTrainedTokenizerBase

from alignjax.algorithms import plugins, reward_endpoints, reward_functions
from alignjax.algorithms.rewards import TextReward
from alignjax.config import Config, field_of_source, kind_of_source, reward_table


def import_functions(config: Config) -> None:
    """Import all functions that score texts; raise UserError for the first that is not there."""
    for name, source in reward_table(config).items():
        if kind_of_source(source.source) == "function":
            plugins.load_function(field_of_source(config, name), source.source)


def load_and_try(
    config: Config,
    train_rows: list[dict],
    heldout_rows: list[dict],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, TextReward]:
    """Return the functions and endpoints of a run by name, each tried.

    Each is called with the first row to train on, and with the first one held out.

    Args:
      config: of the run.
      train_rows: of the prompts.
      heldout_rows: of the prompts.
      tokenizer: of the policy, if it is known already.

    Raises:
      UserError: as a call in a rollout does.
    """
    rows = [*train_rows, *heldout_rows]
    text_rewards: dict[str, TextReward] = {}
    for name, source in reward_table(config).items():
        field = field_of_source(config, name)
        kind = kind_of_source(source.source)
        if kind == "function":
            text_rewards[name] = reward_functions.load(field, source.source, rows)
        elif kind == "endpoint":
            columns = reward_functions.column_names(rows)
            text_rewards[name] = reward_endpoints.load(field, source, columns, tokenizer)
    for text_reward in text_rewards.values():
        for part in (train_rows, heldout_rows):
            if part:
                try_out(text_reward, part[0], config.ppo.samples_per_prompt)
    return text_rewards


def try_out(text_reward: TextReward, row: dict, samples: int) -> None:
    """Call a text-based reward with one row and made-up responses, to show mistakes early.

    There are as many responses as a prompt has in a rollout, at least two: in turn the empty
    text, which a model may well give, and the prompt's own.
    """
    texts = ["", row["prompt"][-1]["content"]]
    count = max(samples, len(texts))
    text_reward([row] * count, [texts[number % 2] for number in range(count)])
