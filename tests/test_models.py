"""The decoder against torch (golden files, and live where torch is installed) and itself."""

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from alignjax.config import Mesh, Model
from alignjax.machine import sharding
from alignjax.models import families, transformer
from alignjax.sampling.ring_cache import RingCache
from alignjax.sampling.row_cache import RowCache
from alignjax.weights import hf

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.parent.name for path in GOLDEN.glob("*/golden.npz"))
SCORES = ["olmo2_score", "qwen2_score"]
# These have four layers, and longer rows on the left only; see test_families.py.
SMALL = [
    "gemma2",
    "gemma3_text",
    "granite",
    "llama_bias",
    "mistral",
    "olmo2",
    "phi3",
    "qwen3_moe",
    "qwen3_moe_window",
    "qwen3_window",
    "seed_oss",
    "smollm3",
]
# Their RoPE depends on the length of a sequence, so tokens cannot be added to one.
BY_LENGTH = ["llama_dynamic", "phi3_long"]
LAYERS_DIFFER = ["gemma2", "gemma3_text", "qwen3_window", "smollm3"]
LM = [name for name in CASES if name not in SCORES + SMALL + BY_LENGTH]
DIFFERENT = ["llama", "qwen", "qwen3"]  # the others differ from these in RoPE and tying only
apply = jax.jit(transformer.apply, static_argnums=0)
TINY = Model(vocab_size=97, d_model=32, layers=2, heads=4, kv_heads=2, head_size=8, d_ff=40)


class Golden(NamedTuple):
    """A checkpoint that transformers wrote, and what torch computes from it."""

    model: Model
    params: dict
    data: Any  # {layout}_tokens, {layout}_mask, {layout}_logits


def golden(name):
    head = "scalar" if name in SCORES else "lm"
    model, params = hf.load_hf(GOLDEN / name, head)
    return Golden(model, params, np.load(GOLDEN / name / "golden.npz"))


class Case(NamedTuple):
    tokens: np.ndarray  # [batch tokens]
    mask: np.ndarray  # [batch tokens]: 0 on pads
    logits: np.ndarray


def golden_case(data, layout):
    """Return one layout of a golden file: "plain", or padded on the "left" or the "right"."""
    return Case(*(data[f"{layout}_{part}"] for part in Case._fields))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, positions, segments):
    hidden = transformer.apply(model, params, tokens, positions, segments).hidden
    return transformer.logits(model, params, hidden)


def run(model, params, tokens, segments, positions=None):
    """Return the logits of one pass; positions count the real tokens unless given."""
    if positions is None:
        positions = count_positions(segments)
    return np.asarray(forward(model, params, tokens, positions, segments))


def count_positions(mask):
    return np.maximum(np.cumsum(np.asarray(mask) > 0, axis=1) - 1, 0)


def error(ours, theirs):
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def largest_error(ours, theirs):
    """Return the largest `error` of the arrays of two trees."""
    return max(jax.tree.leaves(jax.tree.map(error, ours, theirs)))


def words(seed, *shape):
    return np.random.default_rng(seed).integers(1, 96, shape)


def family_fields(family):
    """Return the fields of `Model` that every model of a family has, if it has 32 channels."""
    multiplier = 32**0.5 if family.startswith("gemma") else 1.0
    fields = {"qkv_bias": False, "embedding_multiplier": multiplier}
    if family == "qwen3_moe":
        fields |= {"experts": 8, "experts_per_token": 2}
    return fields | families.FAMILIES[family].flags


def tiny(seed=0, head="lm", **changes):
    """Return a small model and random parameters, norms and biases included.

    numpy draws them, because `init` is slow to compile.
    """
    model = dataclasses.replace(TINY, **changes)
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), head))

    def draw(path, shape):
        mean = path[-1].key == "scale"
        return rng.normal(mean, 0.2, shape.shape).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def test_golden_files_are_all_there():
    others = ["llama", "llama_linear", "qwen", "qwen2", "qwen2_tied", "qwen2_yarn", "qwen3"]
    assert sorted(SCORES + SMALL + BY_LENGTH + others) == CASES


@pytest.mark.parametrize("layout", ["plain", "left", "right"])
@pytest.mark.parametrize("name", LM)
def test_logits_are_those_of_torch(name, layout):
    model, params, data = golden(name)
    tokens, mask, theirs = golden_case(data, layout)
    ours = run(model, params, tokens, mask)
    assert error(ours[mask > 0], theirs[mask > 0]) < 2e-5


@pytest.mark.parametrize("name", DIFFERENT)
def test_packed_rows_give_the_logits_of_torch(name):
    """Both rows of the golden file are in one row, one behind the other."""
    model, params, data = golden(name)
    tokens, _, theirs = golden_case(data, "plain")
    length = tokens.shape[1]
    segments = np.repeat([[1, 2]], length, axis=1)
    positions = np.tile(np.arange(length), (1, 2))
    ours = run(model, params, tokens.reshape(1, -1), segments, positions)
    assert error(ours.reshape(theirs.shape), theirs) < 2e-5


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *itertools.product(DIFFERENT, ["unrolled", "scanned", "joined"]),
        *itertools.product(SMALL, ["joined"]),
        *itertools.product(LAYERS_DIFFER, ["scanned"]),
        *itertools.product(["qwen3_moe", "qwen3_moe_window"], ["unrolled", "scanned"]),
    ],
)
def test_decoding_gives_the_logits_of_torch(name, form, monkeypatch):
    """Prefill six left-padded tokens, then decode through the sampler's cache, two samples each.

    The ring has seven places in parts of two, or 14 in parts of four. From a clock of 0 it fills,
    from 5 it wraps, and from 12 or 26 it is full at once. On a GPU layers are joined, and each slot
    has a row.
    """
    if form == "scanned":
        monkeypatch.setattr(transformer, "UNROLLED", 0)
    monkeypatch.setattr(transformer, "joins_products", lambda: form == "joined")
    model, params, data = golden(name)
    tokens, mask, theirs = golden_case(data, "left")
    model = dataclasses.replace(model, max_length=tokens.shape[1])
    params = transformer.for_sampling(model, params)
    positions = count_positions(mask)
    width = 6  # of the prompt
    ring = tokens.shape[1] - width
    prompt_mask = mask[:, :width]
    prompt = np.repeat(prompt_mask > 0, 2, axis=0)
    fields = {"model": model, "slots": 4, "prompt_width": width, "response_length": ring}
    fields["dtype"] = "float32"
    kind = RowCache(**fields, has_prefix=False) if form == "joined" else RingCache(**fields)

    @jax.jit
    def prefill():
        read = transformer.apply(
            model, params, tokens[:, :width], positions[:, :width], prompt_mask, keep=True
        )
        cache = kind.fill(kind.empty(), None, read.key_values, prompt_mask > 0)
        return transformer.logits(model, params, read.hidden), cache

    @jax.jit
    def step(tokens, places, cache, clock, count):
        layers = transformer.for_decoding(model, params)
        attend = kind.reader(prompt, clock, count).attend
        read = transformer.decode(model, params, layers, tokens, places, cache, attend)
        cache = kind.write(cache, clock, read.key_values, tokens)
        return transformer.logits(model, params, read.hidden), cache

    def column(x, place):
        """Return one place of each row, twice: for both samples of a prompt."""
        return np.repeat(np.asarray(x)[:, place], 2, axis=0)

    if form != "joined":
        assert transformer.unrolled(model) == (form == "unrolled")
    logits, _ = prefill()
    assert error(logits[prompt_mask > 0], theirs[:, :width][prompt_mask > 0]) < 2e-5
    for first in (0, 5, 26 if name in SMALL else 12):
        _, cache = prefill()
        assert isinstance(cache[0], list) == (form == "unrolled")
        for i in range(ring):
            place = width + i
            clock = jnp.int32(first + i)
            count = jnp.full(4, i + 1)
            ours, cache = step(column(tokens, place), column(positions, place), cache, clock, count)
            assert error(ours, column(theirs, place)) < 2e-5


def test_scores_are_those_of_torch():
    """transformers reads a classifier's score at the last token that is not padding."""
    model, params, data = golden("qwen2_score")
    for layout, last in (("plain", [12, 12]), ("left", [12, 12]), ("right", [12, 8])):
        tokens, mask, theirs = golden_case(data, layout)
        hidden = apply(model, params, tokens, count_positions(mask), mask).hidden
        ours = np.asarray(transformer.scalar(params, hidden))[[0, 1], last]
        assert error(ours, theirs[:, 0]) < 2e-5
    params["head"]["bias"] = params["head"]["bias"] + 2.5
    shifted = np.asarray(transformer.scalar(params, hidden))[[0, 1], last]
    assert np.allclose(shifted - ours, 2.5, atol=1e-5)


@pytest.mark.parametrize("pads", [0, 3, 7])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(pads, side):
    model, params = tiny()
    tokens = words(2, 2, 9)
    widths = ((0, 0), (pads, 0) if side == "left" else (0, pads))
    segments = np.pad(np.ones_like(tokens), widths)
    ours = run(model, params, np.pad(tokens, widths, constant_values=5), segments)
    alone = run(model, params, tokens, np.ones_like(tokens))
    assert error(ours[segments > 0].reshape(alone.shape), alone) < 2e-6
    assert np.isfinite(ours).all()


def test_packed_is_unpacked_in_values_and_gradients():
    """Two sequences and pads in a row of 15, against each of the two alone."""
    model, params = tiny()
    tokens = words(3, 1, 15)
    segments = np.repeat([1, 2, 0], 5)[None]
    positions = np.tile(np.arange(5), (1, 3))

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params, tokens, positions, segments):
        logits = forward(model, params, tokens, positions, segments)
        return jnp.sum(jnp.sin(logits) * (segments > 0)[..., None]), logits

    packed, logits = gradient(params, tokens, positions, segments)
    ones = np.ones((1, 5), int)
    first, first_logits = gradient(params, tokens[:, :5], positions[:, :5], ones)
    second, second_logits = gradient(params, tokens[:, 5:10], positions[:, :5], ones)
    assert error(logits[:, :5], first_logits) < 2e-6
    assert error(logits[:, 5:10], second_logits) < 2e-6
    assert largest_error(packed, jax.tree.map(jnp.add, first, second)) < 2e-5


def test_a_row_of_pads_has_finite_gradients():
    model, params = tiny()
    tokens = np.zeros((2, 5), int)
    segments = np.asarray([[1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])

    def loss(params):
        hidden = transformer.apply(model, params, tokens, np.zeros_like(tokens), segments).hidden
        return jnp.sum(hidden**2)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_all_remat_policies_give_the_same_gradient(monkeypatch):
    """So do layers that are scanned and layers that are written out one by one."""
    gradients = {}
    tokens = words(4, 2, 9)
    for remat, unrolled in (("nothing", 2), ("everything", 2), ("dots", 2), ("nothing", 1)):
        monkeypatch.setattr(transformer, "UNROLLED", unrolled)
        model, params = tiny(remat=remat)
        gradient = jax.jit(jax.grad(sum_of_sines, 1), static_argnums=0)
        gradients[remat, unrolled] = gradient(model, params, tokens)
    for gradient in gradients.values():
        assert largest_error(gradient, gradients["nothing", 2]) < 1e-5


def sum_of_sines(model, params, tokens):
    """Return a number that all logits change."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden = transformer.apply(model, params, tokens, positions, jnp.ones_like(tokens)).hidden
    return jnp.sum(jnp.sin(transformer.logits(model, params, hidden)))


INIT = dataclasses.replace(TINY, d_model=64, heads=8, vocab_size=512, d_ff=256)


def fresh(key, part="lm"):
    """Draw all parameters of a language model, or the scalar head alone."""
    if part == "lm":
        return transformer.init(INIT, key, "lm")
    return {"head": transformer.init(INIT, key, part)["head"]}


@pytest.fixture(scope="module")
def on_one_device():
    draw = jax.jit(fresh, static_argnums=1)
    return {part: draw(jax.random.key(7), part) for part in ("lm", "scalar")}


@pytest.mark.parametrize("part", ["lm", "scalar"])
def test_init_is_the_same_on_one_and_eight_devices(part, on_one_device):
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    alone = on_one_device[part]
    draw = functools.partial(fresh, part=part)
    assert len(jax.tree.leaves(alone)[0].sharding.device_set) == 1
    shapes = jax.eval_shape(draw, jax.random.key(7))
    layout = sharding.param_shardings(shapes, sharding.make_mesh(Mesh(2, 2, 2)))
    spread = jax.jit(draw, out_shardings=layout)(jax.random.key(7))
    assert len(jax.tree.leaves(spread)[0].sharding.device_set) == 8
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, alone, spread)))


def test_init_has_fan_in_scale(on_one_device):
    params = on_one_device["lm"]
    head = on_one_device["scalar"]["head"]
    layers = params["layers"]
    for kernel, fan_in in (
        (layers["attention"]["q"]["kernel"], 64),
        (layers["attention"]["out"]["kernel"], 64),
        (layers["mlp"]["down"]["kernel"], 256),
        (params["head"]["kernel"], 64),
    ):
        assert abs(float(kernel.std()) * fan_in**0.5 - 1) < 0.05
        assert kernel.dtype == jnp.float32
    assert not np.array_equal(layers["mlp"]["up"]["kernel"][0], layers["mlp"]["up"]["kernel"][1])
    assert (layers["norm1"]["scale"] == 1).all() and (layers["attention"]["q"]["bias"] == 0).all()
    assert head["bias"].tolist() == [0.0] and head["kernel"].shape == (64, 1)
    assert abs(float(head["kernel"].std()) * 65 - 1) < 0.3


def test_a_mesh_changes_no_logits():
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    model, params = tiny(vocab_size=96, remat="everything")
    tokens = words(5, 8, 9)
    differentiated = jax.jit(jax.value_and_grad(sum_of_sines, 1), static_argnums=0)
    value, gradients = differentiated(model, params, tokens)
    mesh = sharding.make_mesh(Mesh(2, 2, 2))
    with jax.set_mesh(mesh):
        spread = jax.device_put(params, sharding.param_shardings(params, mesh))
        rows = jax.device_put(tokens, NamedSharding(mesh, P(("data", "fsdp"))))
        mesh_value, mesh_gradients = differentiated(model, spread, rows)
    assert abs(mesh_value - value) < 1e-4 * abs(value)
    on_host = jax.tree.map(np.asarray, mesh_gradients)
    assert largest_error(on_host, jax.tree.map(np.asarray, gradients)) < 1e-4


def test_logits_are_float32_in_bfloat16():
    """bfloat16 keeps 8 bits: hidden states differ by a hundredth; logits are summed in float32."""
    model, params = tiny()
    half = dataclasses.replace(model, dtype="bfloat16")
    tokens = words(6, 2, 9)
    ours = run(half, params, tokens, np.ones_like(tokens))
    assert ours.dtype == np.float32
    assert 1e-5 < error(ours, run(model, params, tokens, np.ones_like(tokens))) < 0.05


@pytest.mark.parametrize(
    "name, count",
    [
        ("qwen-1.8b", 1_836_828_672),
        ("qwen-7b", 7_721_324_544),
        ("qwen-14b", 14_167_290_880),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen3-0.6b", 596_049_920),
        ("llama3-8b", 8_030_261_248),
        ("llama3.1-8b", 8_030_261_248),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("granite-3.3-2b", 2_533_539_840),
        ("olmo2-7b", 7_298_617_344),
        ("seed-oss-36b", 36_151_104_512),
        ("smollm3-3b", 3_075_098_624),
        ("mistral-7b", 7_248_023_552),
        ("gemma2-2b", 2_614_341_888),
        ("gemma3-1b", 999_885_952),
        ("phi-3-mini", 3_821_079_552),
        ("phi-4-mini", 3_836_021_760),
        ("phi-4", 14_659_507_200),
    ],
)
def test_presets_have_as_many_parameters_as_the_released_models(name, count):
    model = families.PRESETS[name]
    shapes = jax.eval_shape(lambda: transformer.init(model, jax.random.key(0), "lm"))
    assert sum(shape.size for shape in jax.tree.leaves(shapes)) == count


LENGTH = {"rope_factor": 4.0, "rope_original_length": 16}
LONGROPE = {"rope_short_factors": "1.0,2.0,3.0,4.0", "rope_long_factors": "2.0,4.0,6.0,8.0"}
SCALINGS = {
    "": {},
    "linear": {"rope_factor": 4.0},
    "llama3": LENGTH,
    "yarn": LENGTH | {"rope_high_factor": 32.0, "rope_magnitude": 1.5},
    "dynamic": LENGTH,
    "longrope": LENGTH | LONGROPE,
}


@pytest.mark.parametrize(
    ("family", "scaling"),
    [
        *itertools.product(["qwen2", "qwen3", "llama"], SCALINGS),
        ("phi3", ""),
        ("phi3", "longrope"),
    ],
)
def test_transformers_reads_what_we_write(family, scaling, tmp_path):
    """Live: torch computes the same logits from our random model."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params = tiny(
        family=family,
        **families.FAMILIES[family].flags | {"qkv_bias": family == "qwen2"},
        tied=scaling == "",
        rope_scaling=scaling,
        **SCALINGS[scaling],
    )
    hf.save_hf(model, params, tmp_path)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, pad_token_id=0
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    tokens = words(8, 2, 40)
    with torch.no_grad():
        logits = theirs.float().eval()(torch.tensor(tokens)).logits.numpy()
    assert error(run(model, params, tokens, np.ones_like(tokens)), logits) < 2e-5


def test_transformers_reads_our_reward_model(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, params = tiny(head="scalar")
    params["head"]["bias"][:] = 0  # which transformers would not read
    hf.save_hf(TINY, params, tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokens = words(8, 1, 12)
    with torch.no_grad():
        score = theirs.float().eval()(torch.tensor(tokens)).logits.numpy()
    hidden = apply(TINY, params, tokens, np.arange(12)[None], np.ones_like(tokens)).hidden
    assert error(np.asarray(transformer.scalar(params, hidden))[:, -1:], score) < 2e-5
