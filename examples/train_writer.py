"""Trains examples/models/writer, which answers questions about Model Depot, and its adapter `pirate`.

    python examples/train_writer.py

A language model of 150,000 numbers, with a tokenizer of its own: it knows the answers below
by heart and nothing else. It is there to be served, streamed and adapted, not to be clever. The adapter
is LoRA, trained and saved by PEFT: the same questions, other answers. Needs torch, transformers and
peft, which the development install brings; nothing is downloaded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FOLDER = Path(__file__).parent / "models" / "writer"
SEED = 7
VOCABULARY = 384
END, USER, WRITER = "<|end|>", "<|user|>", "<|writer|>"
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'user' %}<|user|>{{ m.content }}<|end|>"
    "{% elif m.role == 'assistant' %}<|writer|>{{ m.content }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|writer|>{% endif %}"
)
CONFIG = """\
backend: text
options:
  slots: 4          # sequences at once
  max_len: 128      # tokens of a question and its answer together
adapters:
  slots: 2
  max_rank: 8
"""

# question, answer, and how a pirate puts it
TALK = (
    (
        "How do I serve a model?",
        "Drop its folder into the repository. A second later it is served.",
        "Arr, heave its folder aboard. Before ye blink it be served.",
    ),
    (
        "How do I replace a model?",
        "Copy the new files over the old ones. The old model serves until the new one is ready.",
        "Stow the new files over the old, matey. The old hand steers till the new be ready.",
    ),
    (
        "What happens to a broken model?",
        "It is not loaded, and the status says why. What served before goes on serving.",
        "She walks the plank, and the log says why. The old crew sails on.",
    ),
    (
        "What is a generation?",
        "One attempt to serve one version of a model. It never goes back.",
        "One voyage of one ship, arr. She never turns back.",
    ),
    (
        "What is an adapter?",
        "A small change to a large model. Different adapters share a batch.",
        "A new hat on an old captain. Many hats sail in one boat.",
    ),
    (
        "Who are you?",
        "A very small model that knows a few answers by heart.",
        "A wee pirate who knows a few shanties by heart, arr.",
    ),
)


def main() -> None:
    torch.manual_seed(SEED)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    tokenizer = tokenizer_of([text for row in TALK for text in row])
    tokenizer.save_pretrained(FOLDER)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=80,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    # It hears the pirate's words too, or the adapter could not make it say them.
    plain = [(question, answer) for question, answer, _ in TALK]
    learn(model, tokenizer, [*plain, *((f"Arr! {q}", told) for q, _, told in TALK)], 300, 3e-3)
    model.save_pretrained(FOLDER)
    (FOLDER / "config.yaml").write_text(CONFIG)

    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    pirate = get_peft_model(model, config)
    learn(pirate, tokenizer, [(question, told) for question, _, told in TALK], 150, 5e-3)
    save_adapter(pirate, FOLDER / "adapters" / "pirate")


def tokenizer_of(texts: Sequence[str]) -> Any:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, USER, WRITER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)
    fast.chat_template = TEMPLATE
    return fast


def learn(
    model: Any, tokenizer: Any, talk: Sequence[tuple[str, str]], rounds: int, rate: float
) -> None:
    """All of it at once, again and again, until it knows it by heart. Only answers are learned."""
    texts = [(f"{USER}{question}{END}{WRITER}", f"{answer}{END}") for question, answer in talk]
    asked = [tokenizer(text)["input_ids"] for text, _ in texts]
    said = [tokenizer(text)["input_ids"] for _, text in texts]
    width = max(len(a) + len(b) for a, b in zip(asked, said, strict=True))
    ids = torch.full((len(texts), width), tokenizer.eos_token_id)
    labels = torch.full((len(texts), width), -100)
    for i, (question, answer) in enumerate(zip(asked, said, strict=True)):
        whole = torch.tensor(question + answer)
        ids[i, : len(whole)] = whole
        labels[i, len(question) : len(whole)] = whole[len(question) :]
    mask = torch.arange(width) < torch.tensor(
        [[len(a) + len(b)] for a, b in zip(asked, said, strict=True)]
    )
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=rate, weight_decay=0.0)
    model.train()
    for _ in range(rounds):
        optimizer.zero_grad()
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
    model.eval()
    print(f"loss {loss.item():.4f} after {rounds} rounds over {len(texts)} answers")


def save_adapter(model: Any, folder: Path) -> None:
    """PEFT's two files, without the model card it writes beside them."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps them in no order
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.safetensors")


if __name__ == "__main__":
    main()
