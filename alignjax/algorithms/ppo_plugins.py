"""Try the functions of a user's that PPO calls, before anything takes time."""

from collections.abc import Callable

from alignjax.algorithms import estimators, plugins, reward_sources
from alignjax.config import Config, kind_of_source, reward_table
from alignjax.data import mixture


def import_all(config: Config) -> None:
    """Import every function that the config names, and trace the advantage estimator.

    Raises:
      UserError: for the first one that is not there, or that raises an exception.
    """
    reward_sources.import_functions(config)
    if config.ppo.sampler:
        plugins.load_function("ppo.sampler", config.ppo.sampler)
    estimators.check_shapes(config)


def try_before_parents(config: Config, say: Callable[[str], None]) -> None:
    """Do what `PPO.load` does with these functions before the parents of a run are trained."""
    import_all(config)
    kinds = {kind_of_source(source.source) for source in reward_table(config).values()}
    if kinds - {"model"}:
        data = config.data
        sets = mixture.sets(config, "prompts", data.train, data.heldout, say)
        train_rows = [row for rows in sets.train for row in rows]
        reward_sources.load_and_try(config, train_rows, sets.heldout_rows)
