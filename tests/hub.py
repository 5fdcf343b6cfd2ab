"""Hugging Face folders without weights worth the name: what a scan sees, and no framework to make it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "vocab_size": 100, "eos_token_id": None,
}  # fmt: skip
BERT: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 100,
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {
        "idx": 2,
        "name": "2",
        "path": "2_Normalize",
        "type": "sentence_transformers.models.Normalize",
    },
]
WORDS = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}}}
TOKENIZER = json.dumps(WORDS, indent=2).encode()

Files = dict[str, bytes]


def weights(kind: type = np.float32, numbers: int = 6, name: str = "a") -> bytes:
    return save({name: np.ones(numbers, kind)})


def text_files(**config: Any) -> Files:
    """A causal language model's; `config` changes what its config.json says."""
    return {
        "config.json": json.dumps({**LLAMA, **config}).encode(),
        "model.safetensors": weights(),
        "tokenizer.json": TOKENIZER,
    }


def chat_files() -> Files:
    """The same with all that transformers writes beside it."""
    more = {
        "generation_config.json": b'{"eos_token_id": 0}',
        "tokenizer_config.json": b'{"a": "b"}',
    }
    return {**text_files(), **more}


def sharded_files(count: int = 3, **config: Any) -> Files:
    files = text_files(**config)
    del files["model.safetensors"]
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    places = {f"w{i}": name for i, name in enumerate(names)}
    index = {"metadata": {"total_size": 24 * count}, "weight_map": places}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    files |= {name: weights(name=tensor) for tensor, name in places.items()}
    return files


def embed_files(**config: Any) -> Files:
    """An encoder's, as sentence-transformers lays it out."""
    return {
        "config.json": json.dumps({**BERT, **config}).encode(),
        "model.safetensors": weights(),
        "tokenizer.json": TOKENIZER,
        "modules.json": json.dumps(MODULES).encode(),
        "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    }


def lay(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder
