"""The alignment stage of the Qwen Technical Report in JAX."""

import os

# On import, transformers would print that PyTorch is not there, which nothing here needs. Later it
# would print doubts about files, for which this package has checks and errors of its own.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
