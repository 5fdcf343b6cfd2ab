"""What transformers does once in every process at the first load, done before workers are forked.

Only the zygote imports this. It runs no op and starts no thread: it compiles the patterns by which
names in checkpoints are changed, some 900 of them, which takes longer than reading a small model.
"""

from __future__ import annotations

from transformers import conversion_mapping

# Other versions may have no such table; then there is nothing to do ahead.
_find = getattr(conversion_mapping, "get_checkpoint_conversion_mapping", None)
if _find is not None:
    _find("llama")
