"""Sample with transformers 5.23's generate: a small random Qwen2, float32, top-p 0.9, no end token.

usage: python hf_generate.py [tiny|small] [repeats] [static|dynamic] [compile]

64 prompts of 64 tokens with 128 new tokens each, then 32 prompts with num_return_sequences=2. The
last line has the new tokens a second, best and median.

The key-value cache is static unless the command says "dynamic", the library's default, which spends
most of its time in concatenation on a CPU. "compile" makes generate compile the decode step on the
CPU, through a private switch of transformers.

On AMD, MKL takes its slow path, at half the rate. So run it also in this way (compare.py does, as
"best"):
  echo "int mkl_serv_intel_cpu_true(void){return 1;}" | gcc -shared -fPIC -xc -o mkl.so -
  export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
  LD_PRELOAD=./mkl.so MALLOC_TOP_PAD_=268435456 python ...
"""

import statistics
import sys
import time

import torch
from transformers import CompileConfig, Qwen2Config, Qwen2ForCausalLM

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
PROMPTS = 64
PROMPT_TOKENS = 64
NEW_TOKENS = 128

size = sys.argv[1] if len(sys.argv) > 1 else "small"
repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
cache = "dynamic" if "dynamic" in sys.argv else "static"
mode = "compile" if "compile" in sys.argv else "eager"
options = {"cache_implementation": cache} if cache == "static" else {}
if mode == "compile":
    options["compile_config"] = CompileConfig(fullgraph=False, mode="default")
    options["compile_config"]._compile_all_devices = True
torch.manual_seed(0)
config = Qwen2Config(
    **SIZES[size],
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=None,
)
model = Qwen2ForCausalLM(config).eval()
print(
    "params",
    sum(parameter.numel() for parameter in model.parameters()),
    "torch threads",
    torch.get_num_threads(),
    "attention",
    model.config._attn_implementation,
    flush=True,
)


def generate(prompt_ids, samples):
    """Return the new tokens a second of one call."""
    start = time.perf_counter()
    with torch.inference_mode():
        sequences = model.generate(
            prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=True,
            top_p=0.9,
            top_k=0,
            temperature=1.0,
            num_return_sequences=samples,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
    responses = len(prompt_ids) * samples
    assert sequences.shape == (responses, PROMPT_TOKENS + NEW_TOKENS)
    return responses * NEW_TOKENS / (time.perf_counter() - start)


def best_and_median(prompts, samples):
    """Return the best and the median rate of the calls after the first."""
    prompt_ids = torch.randint(
        2,
        config.vocab_size,
        (prompts, PROMPT_TOKENS),
        generator=torch.Generator().manual_seed(1),
    )
    generate(prompt_ids, samples)
    rates = [generate(prompt_ids, samples) for _ in range(repeats)]
    return round(max(rates), 1), round(statistics.median(rates), 1)


one_sample = best_and_median(PROMPTS, 1)
two_samples = best_and_median(PROMPTS // 2, 2)
print(
    "hf_generate",
    size,
    cache,
    mode,
    "new_tokens_per_s best/median",
    *one_sample,
    "two_samples_per_prompt best/median",
    *two_samples,
)
