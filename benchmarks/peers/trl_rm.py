"""Run TRL 1.9.2's RewardTrainer on a small random Qwen2 and synthetic pairs, float32, on the CPU.

usage: python trl_rm.py [tiny|small] [steps] [random|grouped]

The lengths of chosen and rejected are drawn independently: log-normal, median 96, sigma 0.6,
clipped to 8..512. A batch has 16 pairs and is padded to its longest sequence. "grouped" turns on
transformers' grouping by length. The first 5 steps are warm-up. The last line has the real
(non-pad) tokens and the pairs a second.

On AMD, MKL takes its slow path, at half the rate. So run it also in this way (compare.py does, as
"best"):
  echo "int mkl_serv_intel_cpu_true(void){return 1;}" | gcc -shared -fPIC -xc -o mkl.so -
  export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
  LD_PRELOAD=./mkl.so MALLOC_TOP_PAD_=268435456 python ...
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
PAIRS = 16
WARM_UP = 5
LONGEST = 512
PAD = 0

size = sys.argv[1] if len(sys.argv) > 1 else "small"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 30
order = sys.argv[3] if len(sys.argv) > 3 else "random"
torch.manual_seed(0)
config = Qwen2Config(
    **SIZES[size],
    max_position_embeddings=LONGEST,
    tie_word_embeddings=False,
    pad_token_id=PAD,
    eos_token_id=1,
    bos_token_id=None,
    num_labels=1,
)


def make_tokenizer():
    words = {f"t{number}": number for number in range(config.vocab_size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t2")),
        pad_token="t0",
        eos_token="t1",
    )


def make_data():
    random = np.random.default_rng(0)
    lengths = np.exp(random.normal(np.log(96), 0.6, (steps * PAIRS, 2)))
    lengths = np.clip(lengths.round().astype(int), 8, LONGEST)
    pairs = [
        [random.integers(2, config.vocab_size, length).tolist() for length in of_pair]
        for of_pair in lengths
    ]
    return Dataset.from_dict(
        {
            "chosen_ids": [chosen for chosen, _ in pairs],
            "rejected_ids": [rejected for _, rejected in pairs],
            "length": lengths.max(1).tolist(),
        }
    )


# Of each batch, the real tokens and all places.
tokens_of_batches = []
places_of_batches = []


class CountingCollator(DataCollatorForPreference):
    def torch_call(self, examples):
        batch = super().torch_call(examples)
        tokens_of_batches.append(int(batch["attention_mask"].sum()))
        places_of_batches.append(batch["attention_mask"].numel())
        return batch


class Clock(TrainerCallback):
    """Records when each step ends."""

    def __init__(self):
        self.ends = []

    def on_step_end(self, *arguments, **more):
        self.ends.append(time.perf_counter())


model = Qwen2ForSequenceClassification(config)
print(
    "params",
    sum(parameter.numel() for parameter in model.parameters()),
    "torch threads",
    torch.get_num_threads(),
    "attention",
    model.config._attn_implementation,
    flush=True,
)
grouping = {}
if order == "grouped":
    grouping = dict(
        train_sampling_strategy="group_by_length",
        length_column_name="length",
        remove_unused_columns=False,
    )
settings = RewardConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=PAIRS,
    max_steps=steps,
    max_length=LONGEST,
    learning_rate=1e-5,
    report_to=[],
    save_strategy="no",
    bf16=False,
    use_cpu=True,
    gradient_checkpointing=False,
    logging_steps=10**6,
    disable_tqdm=True,
    **grouping,
)
clock = Clock()
trainer = RewardTrainer(
    model=model,
    args=settings,
    train_dataset=make_data(),
    processing_class=make_tokenizer(),
    data_collator=CountingCollator(pad_token_id=PAD),
    callbacks=[clock],
)
with contextlib.redirect_stdout(io.StringIO()):
    trainer.train()
seconds = clock.ends[-1] - clock.ends[WARM_UP - 1]
tokens = sum(tokens_of_batches[WARM_UP:steps])
places = sum(places_of_batches[WARM_UP:steps])
print(
    "trl_rm",
    size,
    order,
    settings.optim,
    "steps",
    steps - WARM_UP,
    "seconds",
    round(seconds, 2),
    "real_tokens_per_s",
    round(tokens / seconds, 1),
    "pairs_per_s",
    round((steps - WARM_UP) * PAIRS / seconds, 2),
    "real_share_of_slots",
    round(tokens / places, 3),
)
