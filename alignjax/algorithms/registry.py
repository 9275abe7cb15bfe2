"""The stages of training by the name that `Config.stage` gives them."""

from alignjax.algorithms.dpo import DirectPreference
from alignjax.algorithms.lm import LanguageModelling
from alignjax.algorithms.ppo import PPO
from alignjax.algorithms.ranking import Ranking
from alignjax.algorithms.stage import Stage

STAGES: dict[str, type[Stage]] = {
    "lm": LanguageModelling,
    "ranking": Ranking,
    "dpo": DirectPreference,
    "ppo": PPO,
}
