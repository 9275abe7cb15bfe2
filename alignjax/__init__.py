"""The alignment stage of the Qwen Technical Report in JAX."""

import os

# On import, transformers would print that PyTorch is not there; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
