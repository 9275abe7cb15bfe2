"""The chain on models of the hub that people use: SFT, a reward model, PPO; whole or by adapters.

python -m alignjax.data.prepare hh_helpful_base
python -m alignjax.train --config hub/models.py:qwen3-8b-ppo         trains its parents first
python -m alignjax.train --config hub/models.py:qwen3-8b-lora-ppo    the same by adapters
python -m alignjax.plan --config hub/models.py:qwen3-8b-lora-ppo --topology h100:1

A variant is a model and a stage: qwen3-8b, llama3.1-8b, mistral-7b, gemma3-4b or qwen3-30b-a3b,
then sft, rm, ppo, lora-sft, lora-rm or lora-ppo. docs/pods.md says which machines hold them. As the
configs of qwen_1_8b otherwise, which say what the report states and which data they want; there is
no PMP. Learning rates of adapters are ten times those for all parameters (ours), as adapters need
them. In the mixture of experts, only the attention has adapters.

Gemma 3 4B is released with a vision tower, which is refused. Its text model must be saved first:
transformers' Gemma3ForCausalLM, with the tokenizer, into models/gemma-3-4b-it-text.

Expect: nothing has been measured here.
"""

from alignjax.config import Config, Lora, load

BASES = {
    "qwen3-8b": "hf://Qwen/Qwen3-8B",
    "llama3.1-8b": "hf://meta-llama/Llama-3.1-8B-Instruct",
    "mistral-7b": "hf://mistralai/Mistral-7B-Instruct-v0.3",
    "gemma3-4b": "models/gemma-3-4b-it-text",
    "qwen3-30b-a3b": "hf://Qwen/Qwen3-30B-A3B",
}
STAGES = ("sft", "rm", "ppo", "lora-sft", "lora-rm", "lora-ppo")
VARIANTS = tuple(f"{model}-{stage}" for model in BASES for stage in STAGES)
MIXTURES = ("qwen3-30b-a3b",)  # of experts
ADAPTER_RATE = 10.0  # times the learning rate


def config(variant: str) -> Config:
    stem, _, stage = variant.rpartition("-")
    model = stem.removesuffix("-lora")
    base = load(f"qwen_1_8b/{stage}.py")
    base.name = variant
    base.tokenizer = ""
    base.chat_template = ""
    if stage == "ppo":
        policy = f"hub/models.py:{stem}-sft"
        reward = f"hub/models.py:{stem}-rm"
        base.parents = {"policy": policy, "reference": policy, "value": reward, "reward": reward}
    else:
        base.parents = {"model": BASES[model]}
    if stem != model:
        base.lora = Lora(rank=16, alpha=32.0)
        if model in MIXTURES:
            base.lora.targets = "q,k,v,out"
        base.optimiser.learning_rate *= ADAPTER_RATE
        base.value_optimiser.learning_rate *= ADAPTER_RATE
        if stage == "ppo":
            base.ppo.slots = 32
    return base
