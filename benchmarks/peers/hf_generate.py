"""Peer baseline: transformers 5.23's generate on a small random Qwen2 (fp32, CPU): sampling with top_p 0.9, no EOS.

usage: python hf_generate.py [tiny|small] [repeats] [static|dynamic] [compile]
64 prompts of 64 tokens, 128 new tokens each; then 32 prompts with num_return_sequences=2. The last line has new tokens/s, best and median.
The KV cache is static unless told otherwise (dynamic, the library's default, spends most of its time in concatenation on CPU).
"compile" has generate compile the decoding step on the CPU, through a private switch of transformers.
On AMD, MKL takes its slow path, at half the rate, so also run it as (compare.py does, as "best")
  echo "int mkl_serv_intel_cpu_true(void){return 1;}" | gcc -shared -fPIC -xc -o mkl.so -
  LD_PRELOAD=./mkl.so MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592 MALLOC_TOP_PAD_=268435456 python ...
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
size = sys.argv[1] if len(sys.argv) > 1 else "small"
repeats = int(sys.argv[2]) if len(sys.argv) > 2 else 3
cache = "dynamic" if "dynamic" in sys.argv else "static"
options = {"cache_implementation": cache} if cache == "static" else {}
if "compile" in sys.argv:
    options["compile_config"] = CompileConfig(fullgraph=False, mode="default")
    options["compile_config"]._compile_all_devices = True
BATCH, PROMPT, NEW = 64, 64, 128
torch.manual_seed(0)
cfg = Qwen2Config(
    **SIZES[size],
    max_position_embeddings=256,
    tie_word_embeddings=False,
    pad_token_id=0,
    eos_token_id=None,
    bos_token_id=None,
)
model = Qwen2ForCausalLM(cfg).eval()
print(
    "params",
    sum(p.numel() for p in model.parameters()),
    "torch threads",
    torch.get_num_threads(),
    "attention",
    model.config._attn_implementation,
    flush=True,
)


def rate(prompts, samples):
    ids = torch.randint(
        2, cfg.vocab_size, (prompts, PROMPT), generator=torch.Generator().manual_seed(1)
    )

    def once(new):
        t = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                do_sample=True,
                top_p=0.9,
                top_k=0,
                temperature=1.0,
                num_return_sequences=samples,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        assert out.shape == (prompts * samples, PROMPT + new)
        return prompts * samples * new / (time.perf_counter() - t)

    once(NEW)
    r = [once(NEW) for _ in range(repeats)]
    return round(max(r), 1), round(statistics.median(r), 1)


one, two = rate(BATCH, 1), rate(BATCH // 2, 2)
print(
    "hf_generate",
    size,
    cache,
    "compile" if "compile" in sys.argv else "eager",
    "new_tokens_per_s best/median",
    *one,
    "two_samples_per_prompt best/median",
    *two,
)
