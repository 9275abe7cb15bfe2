"""Run TRL 1.9.2's PPOTrainer, the last TRL with PPO, on a small random Qwen2 on the CPU.

usage: python trl_ppo.py [small|tiny|0.5b] [iterations] [mean length]

0.5b is the shape of Qwen2.5-0.5B, for a GPU, in bfloat16 with microbatches of 4 rows: with 16 it
does not fit into 80 GB.

Prints the seconds of each PPO iteration after the first, and the response tokens a second of the
median. With a mean length, responses end at random: the end token gets that chance at every place,
whatever came before.
"""

import math
import os
import sys
import tempfile
import time
import warnings

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore")
import contextlib
import io

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

SIZES = {
    "tiny": dict(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=512,
    ),
    "small": dict(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8192,
    ),
    "0.5b": dict(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
    ),
}
PAD = 0
END = 1

size = sys.argv[1] if len(sys.argv) > 1 else "small"
iterations = int(sys.argv[2]) if len(sys.argv) > 2 else 4
mean_length = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
vocab_size = SIZES[size]["vocab_size"]
is_large = size == "0.5b"
PROMPTS = 64 if is_large else 32
PROMPT_TOKENS = 256 if is_large else 32
RESPONSE_TOKENS = 256 if is_large else 64
MICROBATCH = 4 if is_large else PROMPTS
torch.manual_seed(0)


def make_config(**more):
    return Qwen2Config(
        **SIZES[size],
        max_position_embeddings=512 if is_large else 256,
        tie_word_embeddings=is_large,
        pad_token_id=PAD,
        eos_token_id=END,
        bos_token_id=None,
        **more,
    )


def make_tokenizer():
    words = {f"t{number}": number for number in range(vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t2")),
        pad_token="t0",
        eos_token="t1",
        padding_side="left",
    )


def favour_end(module, inputs, logits):
    """Give the end token a chance of (about) 1 / mean_length."""
    odds = math.log(vocab_size / (mean_length - 1))
    return logits + odds * (torch.arange(logits.shape[-1]) == END)


class Clock(TrainerCallback):
    """Records when each step ends."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *arguments, **more):
        self.ends.append(time.perf_counter())


policy = Qwen2ForCausalLM(make_config())
reference = Qwen2ForCausalLM(make_config())
reference.load_state_dict(policy.state_dict())
if mean_length:
    for model in (policy, reference):
        model.lm_head.register_forward_hook(favour_end)
reward = Qwen2ForSequenceClassification(make_config(num_labels=1))
value = Qwen2ForSequenceClassification(make_config(num_labels=1))
print(
    "params",
    sum(parameter.numel() for parameter in policy.parameters()),
    "torch threads",
    torch.get_num_threads(),
    flush=True,
)
prompts = torch.randint(
    2,
    vocab_size,
    (PROMPTS * (iterations + 2), PROMPT_TOKENS),
    generator=torch.Generator().manual_seed(1),
)
data = Dataset.from_dict({"input_ids": prompts.tolist()})
settings = PPOConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=MICROBATCH,
    gradient_accumulation_steps=PROMPTS // MICROBATCH,
    num_mini_batches=4,
    num_ppo_epochs=1,
    local_rollout_forward_batch_size=MICROBATCH,
    response_length=RESPONSE_TOKENS,
    total_episodes=PROMPTS * iterations,
    report_to=[],
    num_sample_generations=0,
    save_strategy="no",
    bf16=is_large,
    use_cpu=not is_large,
    kl_coef=0.04,
    stop_token_id=END if mean_length else None,
    temperature=1.0,
    disable_tqdm=True,
    missing_eos_penalty=None,
    gradient_checkpointing=False,
)
clock = Clock()
trainer = PPOTrainer(
    args=settings,
    processing_class=make_tokenizer(),
    model=policy,
    ref_model=reference,
    reward_model=reward,
    value_model=value,
    train_dataset=data,
    eval_dataset=data.select(range(PROMPTS)),
    callbacks=[clock],
)
with contextlib.redirect_stdout(io.StringIO()):
    trainer.train()
seconds = [end - start for start, end in zip(clock.ends, clock.ends[1:])]
median = sorted(seconds)[len(seconds) // 2]
print(
    "trl_ppo",
    size,
    "seconds_per_iteration",
    [round(value, 2) for value in seconds],
    "response_tokens_per_s",
    round(PROMPTS * RESPONSE_TOKENS / median, 1),
)
