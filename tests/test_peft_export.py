"""The adapters of a run as a PEFT adapter: names, shapes, values, and what peft computes of it."""

import json

import numpy as np
import pytest
from test_convert import GOLDEN
from test_peft import CONFIG, ENDS, WEIGHTS

from alignjax.weights import locations
from alignjax.weights.hf_layout import layout_of
from alignjax.weights.peft_adapter import open_adapter
from alignjax.weights.peft_export import AdaptersToWrite, write_adapter


@pytest.mark.parametrize("targets", ["all", "q,v,down"])
@pytest.mark.parametrize("name", ["llama", "qwen", "qwen3"])
def test_adapters_go_out_and_come_back_to_the_bit(name, targets, tmp_path):
    model = locations.architecture(GOLDEN / name)
    shapes = {path: x for path, x in layout_of(model, "lm").shapes.items()}
    paths = [path for path in shapes if path.startswith("layers/") and path.endswith("/kernel")]
    if targets != "all":
        paths = [path for path in paths if path.split("/")[-2] in targets.split(",")]
    rng = np.random.default_rng(1)
    arrays = {"head/kernel": rng.normal(size=(model.d_model, 1)), "head/bias": np.float32([0.5])}
    for path in paths:
        layers, *sizes = shapes[path]
        inputs = sizes[: 2 if "out/" in path else 1]
        outputs = sizes[len(inputs) :]
        arrays[path.replace("kernel", "lora_a")] = rng.normal(size=(layers, *inputs, 3))
        arrays[path.replace("kernel", "lora_b")] = rng.normal(size=(layers, 3, *outputs))
    arrays = {path: x.astype(np.float32) for path, x in arrays.items()}
    written = AdaptersToWrite(
        model=model, head="scalar", paths=paths, rank=3, alpha=6.0, base=str(GOLDEN / name)
    )
    (tmp_path / "out").mkdir()
    size = write_adapter(written, arrays.__getitem__, tmp_path / "out")
    assert 0 < size < (tmp_path / "out" / WEIGHTS).stat().st_size
    back = open_adapter(tmp_path / "out", model)
    # In Qwen's own files q, k and v are one module; those without an adapter have zeros there.
    assert set(back.parameters) - set(paths) <= {"layers/attention/k/kernel"}
    head = back.read_head()
    assert np.array_equal(head["kernel"], arrays["head/kernel"]) and head["bias"] == 0.5
    for path in paths:
        parameter = back.parameters[path]
        factors = parameter.read(scaled=False)
        lora_a = arrays[path.replace("kernel", "lora_a")]
        lora_b = arrays[path.replace("kernel", "lora_b")]
        if parameter.rank == 3:
            assert np.array_equal(factors.lora_a, lora_a)
            assert np.array_equal(factors.lora_b, lora_b)
        assert {part.scale for part in parameter.layers} == {2.0}
        rows = (len(factors.lora_b), -1, factors.lora_b.shape[1])
        ours = lora_a.reshape(*rows[:2], 3) @ lora_b.reshape(rows[0], 3, -1)
        theirs = factors.lora_a.reshape(rows) @ factors.lora_b.reshape(rows[0], rows[2], -1)
        assert np.allclose(ours, theirs, atol=1e-6)
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    if name == "qwen":
        joined = 3 if targets == "all" else 2
        assert config["rank_pattern"] == {"c_attn": 3 * joined}
        expected = (
            ["c_attn", "c_proj", "w2", "w1"] if targets == "all" else ["c_attn", "mlp.c_proj"]
        )
        assert config["target_modules"] == expected
    else:
        expected = list(ENDS) if targets == "all" else ["q_proj", "v_proj", "down_proj"]
        assert config["target_modules"] == expected and config["rank_pattern"] == {}
