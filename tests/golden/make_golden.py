"""Write the golden checkpoints and logits of this folder; needs torch and transformers.

python tests/golden/make_golden.py [NAME ...]

Each case is a tiny random checkpoint as transformers saves it, and what torch computes from it in
float32 for two rows of tokens: plain, padded on the left, and padded on the right. The cases of
SMALL have longer rows, longer than their windows, on the left only. Weights have fan-in scale, and
norms and biases are random, so that each of them matters. Made with torch 2.13.0 and transformers
5.23.0.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
SIZE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=10000.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16)
CASES = {
    "qwen2": (transformers.Qwen2Config(**SIZE), transformers.Qwen2ForCausalLM),
    "qwen2_tied": (
        transformers.Qwen2Config(**SIZE, tie_word_embeddings=True),
        transformers.Qwen2ForCausalLM,
    ),
    "qwen2_yarn": (
        transformers.Qwen2Config(**SIZE, rope_parameters=YARN),
        transformers.Qwen2ForCausalLM,
    ),
    "qwen2_score": (
        transformers.Qwen2Config(**SIZE, num_labels=1),
        transformers.Qwen2ForSequenceClassification,
    ),
    "qwen3": (transformers.Qwen3Config(**SIZE, head_dim=16), transformers.Qwen3ForCausalLM),
    "llama": (
        transformers.LlamaConfig(**SIZE, rope_parameters=LLAMA3),
        transformers.LlamaForCausalLM,
    ),
    "llama_linear": (
        transformers.LlamaConfig(
            **SIZE, rope_parameters=dict(rope_type="linear", rope_theta=500.0, factor=3.0)
        ),
        transformers.LlamaForCausalLM,
    ),
}
QWEN = dict(
    architectures=["QWenLMHeadModel"],
    model_type="qwen",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=4,
    kv_channels=8,
    seq_length=64,
    rotary_emb_base=10000,
    rotary_pct=1.0,
    layer_norm_epsilon=1e-6,
    no_bias=True,
    tie_word_embeddings=False,
    use_dynamic_ntk=True,
    use_logn_attn=True,
    scale_attn_weights=True,
    attn_dropout_prob=0.0,
    emb_dropout_prob=0.0,
)
LENGTHS = (13, 9)
SMALL_SIZE = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
SMALL_LENGTHS = (20, 15)
FULL = "full_attention"
SLIDING = "sliding_attention"
LONGROPE = dict(
    rope_type="longrope",
    rope_theta=100.0,
    partial_rotary_factor=0.75,
    short_factor=[1.0, 1.5, 1.25],
    long_factor=[1.0, 4.0, 9.0],
)
SMALL = {
    "llama_bias": (
        transformers.LlamaConfig(**SMALL_SIZE, attention_bias=True, mlp_bias=True),
        transformers.LlamaForCausalLM,
    ),
    "granite": (
        transformers.GraniteConfig(
            **SMALL_SIZE,
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            attention_multiplier=0.3,
            logits_scaling=2.5,
        ),
        transformers.GraniteForCausalLM,
    ),
    "olmo2": (transformers.Olmo2Config(**SMALL_SIZE), transformers.Olmo2ForCausalLM),
    "seed_oss": (
        transformers.SeedOssConfig(**SMALL_SIZE, head_dim=8, attention_out_bias=True),
        transformers.SeedOssForCausalLM,
    ),
    "smollm3": (
        transformers.SmolLM3Config(**SMALL_SIZE, no_rope_layers=[1, 0, 1, 1]),
        transformers.SmolLM3ForCausalLM,
    ),
    "mistral": (
        transformers.MistralConfig(**SMALL_SIZE, sliding_window=5),
        transformers.MistralForCausalLM,
    ),
    "qwen3_window": (
        transformers.Qwen3Config(
            **SMALL_SIZE,
            head_dim=8,
            use_sliding_window=True,
            sliding_window=4,
            layer_types=[FULL, SLIDING, SLIDING, FULL],
        ),
        transformers.Qwen3ForCausalLM,
    ),
    "gemma2": (
        transformers.Gemma2Config(
            **SMALL_SIZE | dict(tie_word_embeddings=True),
            head_dim=8,
            sliding_window=5,
            query_pre_attn_scalar=5,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=2.0,
        ),
        transformers.Gemma2ForCausalLM,
    ),
    "gemma3_text": (
        transformers.Gemma3TextConfig(
            **SMALL_SIZE | dict(tie_word_embeddings=True),
            head_dim=8,
            sliding_window=5,
            query_pre_attn_scalar=8,
            layer_types=[SLIDING, SLIDING, FULL, SLIDING],
            rope_parameters={
                FULL: dict(rope_type="linear", factor=4.0, rope_theta=1e6),
                SLIDING: dict(rope_type="default", rope_theta=100.0),
            },
        ),
        transformers.Gemma3ForCausalLM,
    ),
    "olmo2_score": (
        transformers.Olmo2Config(**SMALL_SIZE, num_labels=1),
        transformers.Olmo2ForSequenceClassification,
    ),
    # Heads of eight numbers, of which six are rotated.
    "phi3": (
        transformers.Phi3Config(
            **SMALL_SIZE | dict(hidden_size=32),
            sliding_window=5,
            original_max_position_embeddings=32,
            rope_parameters=LONGROPE,
        ),
        transformers.Phi3ForCausalLM,
    ),
    # One row is longer than the original length, the other one is not.
    "phi3_long": (
        transformers.Phi3Config(
            **SMALL_SIZE | dict(hidden_size=32, tie_word_embeddings=True),
            original_max_position_embeddings=16,
            rope_parameters=LONGROPE,
        ),
        transformers.Phi3ForCausalLM,
    ),
    "llama_dynamic": (
        transformers.LlamaConfig(
            **SMALL_SIZE | dict(max_position_embeddings=16),
            rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=4.0),
        ),
        transformers.LlamaForCausalLM,
    ),
    "qwen3_moe": (
        transformers.Qwen3MoeConfig(
            **SMALL_SIZE,
            head_dim=8,
            moe_intermediate_size=12,
            num_experts=6,
            num_experts_per_tok=2,
            norm_topk_prob=True,
        ),
        transformers.Qwen3MoeForCausalLM,
    ),
    "qwen3_moe_window": (
        transformers.Qwen3MoeConfig(
            **SMALL_SIZE,
            head_dim=8,
            moe_intermediate_size=8,
            num_experts=4,
            num_experts_per_tok=3,
            use_sliding_window=True,
            sliding_window=5,
        ),
        transformers.Qwen3MoeForCausalLM,
    ),
    # The family that docs/extending.md adds.
    "outside/exaone4": (
        transformers.Exaone4Config(
            **SMALL_SIZE, sliding_window=5, layer_types=[SLIDING, SLIDING, FULL, SLIDING]
        ),
        transformers.Exaone4ForCausalLM,
    ),
}


def randomise(named, generator):
    """Draw values that bfloat16 can represent: the files are half as large and lose nothing."""
    for name, x in named:
        noise = torch.randn(x.shape, generator=generator)
        if x.ndim > 1:
            noise = noise * x.shape[-1] ** -0.5
        else:
            noise = 1 + 0.3 * noise if "norm" in name or "ln_" in name else 0.3 * noise
        x.data.copy_(noise.bfloat16().float())


def inputs(generator, words=64, lengths=LENGTHS):
    """Return layout -> (tokens, mask), each [batch tokens]; "plain" has only full rows."""
    tokens = torch.randint(1, words, (2, max(lengths)), generator=generator)
    right = tokens.clone()
    mask = torch.ones_like(tokens)
    for row, length in enumerate(lengths):
        right[row, length:] = 0
        mask[row, length:] = 0
    left = torch.stack(
        [torch.roll(x, max(lengths) - n) for x, n in zip(right, lengths, strict=True)]
    )
    return {
        "plain": (tokens, torch.ones_like(tokens)),
        "left": (left, left.ne(0).long()),
        "right": (right, mask),
    }


def qwen_weights():
    d, f, v = QWEN["hidden_size"], QWEN["intermediate_size"] // 2, QWEN["vocab_size"]
    weights = {
        "transformer.wte.weight": (v, d),
        "transformer.ln_f.weight": (d,),
        "lm_head.weight": (v, d),
    }
    for i in range(QWEN["num_hidden_layers"]):
        layer = {
            "attn.c_attn.weight": (3 * d, d),
            "attn.c_attn.bias": (3 * d,),
            "attn.c_proj.weight": (d, d),
            "mlp.w1.weight": (f, d),
            "mlp.w2.weight": (f, d),
            "mlp.c_proj.weight": (d, f),
            "ln_1.weight": (d,),
            "ln_2.weight": (d,),
        }
        weights |= {f"transformer.h.{i}.{name}": shape for name, shape in layer.items()}
    return {name: torch.zeros(shape) for name, shape in weights.items()}


def qwen_logits(w, tokens, mask, positions):
    """Compute the report's own Qwen, which transformers has no class for.

    It is written from the facts of its architecture.
    """
    heads, size = QWEN["num_attention_heads"], QWEN["kv_channels"]
    angle = positions[..., None].float() * QWEN["rotary_emb_base"] ** (
        -torch.arange(0, size, 2).float() / size
    )
    turn = torch.polar(torch.ones_like(angle), angle)[:, :, None]  # a pair is one complex number

    def norm(x, scale):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + QWEN["layer_norm_epsilon"]) * scale

    def rotate(x):
        z = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turn
        return torch.cat([z.real, z.imag], -1)

    t = tokens.shape[1]
    allowed = torch.tril(torch.ones(t, t)).bool() & mask[:, None].bool()
    x = w["transformer.wte.weight"][tokens]
    for i in range(QWEN["num_hidden_layers"]):
        at = {name.split(f".h.{i}.")[1]: x for name, x in w.items() if f".h.{i}." in name}
        fused = norm(x, at["ln_1.weight"]) @ at["attn.c_attn.weight"].T + at["attn.c_attn.bias"]
        q, k, v = (y.unflatten(-1, (heads, size)) for y in fused.chunk(3, -1))
        scores = torch.einsum("bqnh,bknh->bnqk", rotate(q), rotate(k)) / size**0.5
        weights = scores.masked_fill(~allowed[:, None], -1e30).softmax(-1)
        x = x + torch.einsum("bnqk,bknh->bqnh", weights, v).flatten(-2) @ at["attn.c_proj.weight"].T
        y = norm(x, at["ln_2.weight"])
        up, gate = y @ at["mlp.w1.weight"].T, y @ at["mlp.w2.weight"].T
        x = x + (up * torch.nn.functional.silu(gate)) @ at["mlp.c_proj.weight"].T
    return norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


def row_by_row(model, tokens, mask, positions):
    """Return the logits of each row alone: some kinds of RoPE depend on the longest of a batch."""
    rows = [
        model(*row[:1], attention_mask=row[1], position_ids=row[2]).logits
        for row in zip(tokens.split(1), mask.split(1), positions.split(1), strict=True)
    ]
    return torch.cat(rows)


def main():
    chosen = sys.argv[1:]
    for seed, name in enumerate([*CASES, "qwen", *SMALL]):
        if chosen and name not in chosen:
            continue
        generator = torch.Generator().manual_seed(seed)
        folder = HERE / name
        folder.mkdir(parents=True, exist_ok=True)
        if name == "qwen":
            weights = qwen_weights()
            randomise(weights.items(), generator)
            save_file(
                {k: x.bfloat16() for k, x in weights.items()},
                folder / "model.safetensors",
                {"format": "pt"},
            )
            (folder / "config.json").write_text(json.dumps(QWEN, indent=1))
        else:
            config, kind = (CASES | SMALL)[name]
            # Other implementations leave out soft caps.
            config._attn_implementation = "eager"
            model = kind(config).eval()
            randomise(model.named_parameters(), generator)
        arrays = {}
        if name in SMALL:
            layouts = {"left": inputs(generator, 32, SMALL_LENGTHS)["left"]}
        else:
            layouts = inputs(generator)
        for layout, (tokens, mask) in layouts.items():
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                if name == "qwen":
                    logits = qwen_logits(weights, tokens, mask, positions)
                else:
                    logits = row_by_row(model, tokens, mask, positions)
            arrays |= {f"{layout}_tokens": tokens.numpy(), f"{layout}_mask": mask.numpy()}
            arrays[f"{layout}_logits"] = logits.float().numpy()
        if name != "qwen":
            # One case stays in float32, so that both types are read. Casting comes last, because
            # it rounds RoPE's frequencies.
            (model if name == "qwen3" else model.to(torch.bfloat16)).save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "golden.npz", **arrays)


if __name__ == "__main__":
    main()
