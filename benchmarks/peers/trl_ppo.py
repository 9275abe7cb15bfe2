"""Peer baseline: TRL 1.9.2's PPOTrainer (the last line of TRL that ships PPO) on a small random Qwen2, CPU.

Prints one line per PPO iteration after the first: seconds and response tokens per second.
usage: python trl_ppo.py [small|tiny] [iterations] [mean length]
With a mean length, responses end at random: the end token gets that chance at every place, whatever came before.
"""

import math
import os
import sys
import tempfile
import time
import warnings

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
warnings.filterwarnings("ignore")
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
}
size = sys.argv[1] if len(sys.argv) > 1 else "small"
iters = int(sys.argv[2]) if len(sys.argv) > 2 else 4
mean = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
QUERIES, PROMPT, RESPONSE = 32, 32, 64
torch.manual_seed(0)
cfg = Qwen2Config(
    **SIZES[size],
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
)
cfg1 = Qwen2Config(
    **SIZES[size],
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=None,
    num_labels=1,
)
tk = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(
        models.WordLevel({f"t{i}": i for i in range(cfg.vocab_size)}, unk_token="t2")
    ),
    pad_token="t0",
    eos_token="t1",
    padding_side="left",
)
policy, ref = Qwen2ForCausalLM(cfg), Qwen2ForCausalLM(cfg)
ref.load_state_dict(policy.state_dict())
if mean:
    odds = math.log(cfg.vocab_size / (mean - 1))
    for model in (policy, ref):
        model.lm_head.register_forward_hook(
            lambda module, inputs, out: out + odds * (torch.arange(out.shape[-1]) == 1)
        )
reward, value = Qwen2ForSequenceClassification(cfg1), Qwen2ForSequenceClassification(cfg1)
print(
    "params",
    sum(p.numel() for p in policy.parameters()),
    "torch threads",
    torch.get_num_threads(),
    flush=True,
)
g = torch.Generator().manual_seed(1)
ds = Dataset.from_dict(
    {
        "input_ids": torch.randint(
            2, cfg.vocab_size, (QUERIES * (iters + 2), PROMPT), generator=g
        ).tolist()
    }
)
args = PPOConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=QUERIES,
    gradient_accumulation_steps=1,
    num_mini_batches=4,
    num_ppo_epochs=1,
    local_rollout_forward_batch_size=QUERIES,
    response_length=RESPONSE,
    total_episodes=QUERIES * iters,
    report_to=[],
    num_sample_generations=0,
    save_strategy="no",
    bf16=False,
    use_cpu=True,
    kl_coef=0.04,
    stop_token_id=1 if mean else None,
    temperature=1.0,
    disable_tqdm=True,
    missing_eos_penalty=None,
    gradient_checkpointing=False,
)
stamps = []


class Clock(TrainerCallback):
    def on_step_end(self, *a, **k):
        stamps.append(time.perf_counter())


tr = PPOTrainer(
    args=args,
    processing_class=tk,
    model=policy,
    ref_model=ref,
    reward_model=reward,
    value_model=value,
    train_dataset=ds,
    eval_dataset=ds.select(range(QUERIES)),
    callbacks=[Clock()],
)
import contextlib
import io

with contextlib.redirect_stdout(io.StringIO()):
    tr.train()
d = [b - a for a, b in zip(stamps, stamps[1:])]
print(
    "trl_ppo",
    size,
    "seconds_per_iteration",
    [round(x, 2) for x in d],
    "response_tokens_per_s",
    round(QUERIES * RESPONSE / sorted(d)[len(d) // 2], 1),
)
