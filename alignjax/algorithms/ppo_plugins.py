"""Try the functions of a user's that PPO calls, before anything takes time."""

from collections.abc import Callable

from alignjax.algorithms import estimators, plugins, reward_functions
from alignjax.config import Config
from alignjax.data import mixture


def import_all(config: Config) -> None:
    """Import every function that the config names, and trace the advantage estimator.

    Raises:
      UserError: for the first one that is not there, or that raises an exception.
    """
    ppo = config.ppo
    if ppo.reward_fn:
        plugins.load_function("ppo.reward_fn", ppo.reward_fn)
    if ppo.sampler:
        plugins.load_function("ppo.sampler", ppo.sampler)
    estimators.check_shapes(config)


def try_before_parents(config: Config, say: Callable[[str], None]) -> None:
    """Do what `PPO.load` does with these functions before the parents of a run are trained."""
    import_all(config)
    if config.ppo.reward_fn:
        data = config.data
        sets = mixture.sets(config, "prompts", data.train, data.heldout, say)
        train_rows = [row for rows in sets.train for row in rows]
        reward_functions.load_and_try(config.ppo, train_rows, sets.heldout_rows)
