"""Nothing is looked up on a hub, and nothing is collected where the extra `hf` is not installed."""

import importlib.util
import os

# Before the first import of the packages that read them.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

EXTRA = ("transformers", "trl", "datasets", "tokenizers", "accelerate")
collect_ignore_glob = [] if all(importlib.util.find_spec(name) is not None for name in EXTRA) else ["*.py"]
