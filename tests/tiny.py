"""Tiny models as people drop them: Hugging Face folders with random weights and a tokenizer of their
own, PEFT adapters for them. Made on the spot, in a second or less; nothing is downloaded.

torch, transformers and peft are imported when something is made, not before.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

SIZES: dict[str, int] = {"hidden": 64, "layers": 2, "heads": 4, "vocab": 400, "positions": 256}
SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "a model server loads models, unloads models and counts their bytes",
    "drop a folder, see it served in a second; break it, read why in one line",
    "naïve café, größer, 東京, привет, 🦊 and 🚀 take several bytes each",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 + - * / = ( ) [ ] { } ? ! . , : ;",
)
HOME = "sentence_transformers.models"
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab"],
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return tokenizer


def tokenizer() -> Any:
    """As transformers would read it from a folder."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(), eos_token="<|end|>", pad_token="<|end|>"
    )


def write_tokenizer(folder: Path, *, chat: bool = True) -> None:
    fast = tokenizer()
    if chat:
        fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


def config_of(kind: str, **changes: Any) -> Any:
    """`kind`: llama, gpt2, qwen2, qwen3, mistral, mamba, bert."""
    import transformers as hf

    h, n, heads = SIZES["hidden"], SIZES["layers"], SIZES["heads"]
    common: dict[str, Any] = {"vocab_size": SIZES["vocab"], "eos_token_id": 0, "pad_token_id": 0}
    usual = {
        "hidden_size": h,
        "intermediate_size": 2 * h,
        "num_hidden_layers": n,
        "num_attention_heads": heads,
        "max_position_embeddings": SIZES["positions"],
    }
    grouped = {**usual, "num_key_value_heads": heads // 2}
    gpt2 = {
        "bos_token_id": 0,
        "n_embd": h,
        "n_layer": n,
        "n_head": heads,
        "n_positions": SIZES["positions"],
    }
    mamba = {"hidden_size": h, "num_hidden_layers": n, "state_size": 8}
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (hf.LlamaConfig, grouped),
        "gpt2": (hf.GPT2Config, gpt2),
        "qwen2": (hf.Qwen2Config, grouped),
        "qwen3": (hf.Qwen3Config, {**grouped, "head_dim": 16}),
        "mistral": (hf.MistralConfig, {**grouped, "sliding_window": 16}),
        "mamba": (hf.MambaConfig, mamba),
        "bert": (hf.BertConfig, usual),
    }
    make, sizes = kinds[kind]
    return make(**{**common, **sizes, **changes})


def model_of(kind: str, *, seed: int = 0, **changes: Any) -> Any:
    """The model itself, in eval mode. Weights are wide enough that what it writes varies."""
    import torch
    import transformers as hf

    torch.manual_seed(seed)
    config = config_of(kind, **{"initializer_range": 0.3, **changes})
    auto = hf.AutoModel if kind == "bert" else hf.AutoModelForCausalLM
    return auto.from_config(config).eval()


def write_text_model(
    folder: Path, kind: str = "llama", *, seed: int = 0, chat: bool = True, **changes: Any
) -> Path:
    """A causal language model's folder: config.json, model.safetensors, tokenizer.json ..."""
    folder.mkdir(parents=True, exist_ok=True)
    model_of(kind, seed=seed, **changes).save_pretrained(folder)
    write_tokenizer(folder, chat=chat)
    return folder


def write_encoder(folder: Path, *, seed: int = 0, pooling: str = "mean", **changes: Any) -> Path:
    """An encoder's folder as sentence-transformers lays it out: modules.json, 1_Pooling."""
    folder.mkdir(parents=True, exist_ok=True)
    model_of("bert", seed=seed, **changes).save_pretrained(folder)
    write_tokenizer(folder, chat=False)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"{HOME}.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    how = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens"}
    said = {f"pooling_mode_{word}": kind == pooling for kind, word in how.items()}
    said["word_embedding_dimension"] = changes.get("hidden_size", SIZES["hidden"])
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(said))
    limits = {"max_seq_length": SIZES["positions"], "do_lower_case": False}
    (folder / "sentence_bert_config.json").write_text(json.dumps(limits))
    return folder


def write_adapter(
    folder: Path,
    model: Any,
    *,
    seed: int = 0,
    r: int = 4,
    alpha: float = 8,
    targets: tuple[str, ...] = ("q_proj", "v_proj"),
    **more: Any,
) -> Path:
    """A PEFT LoRA adapter for `model` (left as it was), with weights that change what it says."""
    import copy
    import warnings

    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=alpha, target_modules=list(targets), **more)
    with warnings.catch_warnings():  # PEFT asks transformers by a name that has grown old
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")
        wrapped = get_peft_model(copy.deepcopy(model), config)
    torch.manual_seed(1000 + seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    wrapped.save_pretrained(folder)
    return folder
