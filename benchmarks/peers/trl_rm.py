"""Peer baseline: TRL 1.9.2's RewardTrainer on a small random Qwen2 and synthetic preference pairs of varying length (fp32, CPU).

usage: python trl_rm.py [tiny|small] [steps] [random|grouped]
Chosen and rejected lengths are drawn apart: log-normal, median 96, sigma 0.6, clipped to 8..512; 16 pairs a batch, padded to its longest.
"grouped" turns on transformers' length grouping. The first 5 steps are warm-up. The last line has real (non-pad) tokens/s and pairs/s.
On AMD, MKL takes its slow path, at half the rate, so also run it as (compare.py does, as "best")
  echo "int mkl_serv_intel_cpu_true(void){return 1;}" | gcc -shared -fPIC -xc -o mkl.so -
  LD_PRELOAD=./mkl.so MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 python ...
"""

import contextlib
import io
import sys
import tempfile
import time
import warnings

warnings.filterwarnings("ignore")
import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

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
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30
order = sys.argv[3] if len(sys.argv) > 3 else "random"
PAIRS, WARM = 16, 5
torch.manual_seed(0)
cfg = Qwen2Config(
    **SIZES[size],
    max_position_embeddings=512,
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
)
model = Qwen2ForSequenceClassification(cfg)
print(
    "params",
    sum(p.numel() for p in model.parameters()),
    "torch threads",
    torch.get_num_threads(),
    "attention",
    model.config._attn_implementation,
    flush=True,
)
g = np.random.default_rng(0)
lens = np.clip(np.exp(g.normal(np.log(96), 0.6, (steps * PAIRS, 2))).round().astype(int), 8, 512)
rows = [[g.integers(2, cfg.vocab_size, n).tolist() for n in pair] for pair in lens]
ds = Dataset.from_dict(
    {
        "chosen_ids": [r[0] for r in rows],
        "rejected_ids": [r[1] for r in rows],
        "length": lens.max(1).tolist(),
    }
)
sampling = (
    dict(
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        remove_unused_columns=False,
    )
    if order == "grouped"
    else {}
)
args = RewardConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=PAIRS,
    max_steps=steps,
    max_length=512,
    learning_rate=1e-5,
    report_to=[],
    save_strategy="no",
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    logging_steps=10**6,
    disable_tqdm=True,
    **sampling,
)
real, padded, stamps = [], [], []


class Count(DataCollatorForPreference):
    def torch_call(self, examples):
        out = super().torch_call(examples)
        real.append(int(out["attention_mask"].sum()))
        padded.append(out["attention_mask"].numel())
        return out


class Clock(TrainerCallback):
    def on_step_end(self, *a, **k):
        stamps.append(time.perf_counter())


tr = RewardTrainer(
    model=model,
    args=args,
    train_dataset=ds,
    processing_class=tk,
    data_collator=Count(pad_token_id=0),
    callbacks=[Clock()],
)
with contextlib.redirect_stdout(io.StringIO()):
    tr.train()
took, tokens, slots = stamps[-1] - stamps[WARM - 1], sum(real[WARM:steps]), sum(padded[WARM:steps])
print(
    "trl_rm",
    size,
    order,
    args.optim,
    "steps",
    steps - WARM,
    "seconds",
    round(took, 2),
    "real_tokens_per_s",
    round(tokens / took, 1),
    "pairs_per_s",
    round((steps - WARM) * PAIRS / took, 2),
    "real_share_of_slots",
    round(tokens / slots, 3),
)
