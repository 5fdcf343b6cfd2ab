"""A Hugging Face folder, as far as the front must know it: what it is, which of its files are needed
and whether they are there, and what its sizes are. Read with limits, and never by transformers.

    config.json                     which architecture, and its sizes
    model.safetensors               the weights; or model.safetensors.index.json and its shards
    tokenizer.json
    modules.json, 1_Pooling/        what sentence-transformers puts behind an encoder; the encoder may
                                    have a folder of its own there (its *home*, "0_Transformer/")
    onnx/model.onnx                 the same encoder once more, for onnxruntime
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from repository.folder.files import Fields, Files, decoded
from repository.folder.flaws import STILL_COPYING, FlawError
from repository.names import shown

CONFIG, MODULES, TOKENIZER = "config.json", "modules.json", "tokenizer.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GRAPHS = ("onnx/model.onnx", "model.onnx")  # where an encoder's ONNX file may lie
# Any of these says: this is such a folder, or the beginning of one.
MARKS = frozenset({CONFIG, MODULES, TOKENIZER, INDEX})
LARGEST_INDEX = 16 << 20  # bytes; 92,000 tensors have 9 MB
MOST_TOLD = 3  # shards that are missing

_WRITES = re.compile(r"\w+(ForCausalLM|LMHeadModel)")
_ENCODES = re.compile(r"\w+(Model|ForMaskedLM|ForPreTraining)")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = re.compile(r"(pytorch_model|model).*\.(bin|pth|ckpt)|pytorch_model\.bin\.index\.json")
_PLAIN = re.compile(r"[^/\\\0]+")
# Left behind by sentence-transformers where there is a modules.json too.
_BESIDE_MODULES = ("config_sentence_transformers.json", "sentence_bert_config.json")
_SAYS_MORE = (
    "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", *_BESIDE_MODULES,
)  # fmt: skip
# What tokenizers are made of, where nobody has written a tokenizer.json yet.
_OTHER_TOKENIZERS = (
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Described:
    """What config.json says.

    remote_code  the code in the folder that it wants to be run for it; "": none
    encoder      it has words and no decoder of its own beside an encoder
    dtype        of its weights, as transformers names it ("bfloat16"); "": not said
    layers, kv_heads, head_dim, positions   0: not said
    """

    architectures: tuple[str, ...] = ()
    model_type: str = ""
    remote_code: str = ""
    encoder: bool = False
    dtype: str = ""
    layers: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    positions: int = 0

    @property
    def writes(self) -> bool:
        """Its architecture is one that writes text."""
        return any(_WRITES.fullmatch(a) for a in self.architectures)

    @property
    def encodes(self) -> bool:
        """Its architecture is an encoder of texts, without a head that would be left off."""
        heads = [_ENCODES.fullmatch(a) for a in self.architectures]
        return self.encoder and bool(heads) and all(heads)


def is_huggingface(names: Collection[str]) -> bool:
    return any(mark in names for mark in MARKS)


def is_pooled(names: Collection[str]) -> bool:
    """sentence-transformers has been here."""
    return MODULES in names or "1_Pooling/config.json" in names


def describe(files: Files, home: str = "") -> Described:
    """Raises FlawError for a config.json that is not there, not whole, or not one."""
    _need(files, home + CONFIG)
    said = files.fields(home + CONFIG)
    sizes = said.within("text_config") if "text_config" in said else said
    heads = sizes.number("num_attention_heads", "n_head", "n_heads", "num_heads")
    hidden = sizes.number("hidden_size", "n_embd", "d_model", "dim")
    return Described(
        architectures=said.texts("architectures"),
        model_type=said.text("model_type"),
        remote_code=_remote_code(said),
        encoder="vocab_size" in said and not said.flag("is_encoder_decoder"),
        dtype=said.text("dtype", "torch_dtype") or sizes.text("dtype", "torch_dtype"),
        layers=sizes.number("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
        kv_heads=_kv_heads(sizes, heads),
        head_dim=sizes.number("head_dim") or (hidden // heads if heads else 0),
        positions=sizes.number("max_position_embeddings", "n_positions"),
    )


def _kv_heads(sizes: Fields, heads: int) -> int:
    if sizes.flag("multi_query") and not sizes.flag("new_decoder_architecture"):
        return 1
    return sizes.number("num_key_value_heads", "num_kv_heads") or heads


def _remote_code(said: Fields) -> str:
    """`auto_map` names classes in files of the folder: {"AutoModel": "modeling_x.XModel"}."""
    mapped = said.within("auto_map")
    if not mapped.names():
        return ""
    key = "AutoModelForCausalLM" if "AutoModelForCausalLM" in mapped else mapped.names()[0]
    return mapped.raw(key).decode("utf-8", "replace").strip('"')


def refuse_remote_code(described: Described) -> None:
    """Raises FlawError. It is never run, whether code is trusted or not."""
    if described.remote_code:
        raise FlawError(
            "trust",
            f"it asks for code from its own folder (auto_map: {shown(described.remote_code)}), "
            "which is never run",
            f"remove 'auto_map' if transformers knows the model type '{shown(described.model_type)}' "
            "by itself; else write a model.py (backend: torch_module or python)",
            name=CONFIG,
        )


# weights ----------------------------------------------------------------------------------------


def _need(files: Files, name: str, hint: str = STILL_COPYING, more: str = "") -> None:
    if name not in files.sizes:
        raise FlawError("incomplete", f"'{shown(name)}' is not there{more}", hint, name=name)


def weights_in(files: Files, home: str = "") -> tuple[str, ...]:
    """The safetensors files that are loaded, all of them there; () where there is not a trace of any.

    Raises FlawError for shards that are missing, or that an index names elsewhere.
    """
    if home + WEIGHTS in files.sizes:
        return (home + WEIGHTS,)
    index = home + INDEX
    if index in files.sizes:
        return _shards(files, index, home)
    loose = [n for n in files.names(home) if _SHARD.fullmatch(n)]
    if loose:
        _need(files, index, more=f", only shards ('{shown(loose[0])}' ...)")
    return ()


def _shards(files: Files, index: str, home: str) -> tuple[str, ...]:
    said = files.fields(index, LARGEST_INDEX)
    places = decoded(index, said.raw("weight_map") or b"{}", dict[str, str])
    names = sorted(set(places.values()))
    if not names:
        raise FlawError("config", "its 'weight_map' names no file", name=index)
    for name in names:
        if not _PLAIN.fullmatch(name) or not name.endswith(".safetensors"):
            raise FlawError(
                "link",
                f"it names '{shown(name)}', which is no safetensors file beside it",
                "name the shards without folders",
                name=index,
            )
    missing = [n for n in names if home + n not in files.sizes]
    if missing:
        first = ", ".join(f"'{shown(n)}'" for n in missing[:MOST_TOLD])
        more = " ..." if len(missing) > MOST_TOLD else ""
        verb = "is" if len(missing) == 1 else "are"
        raise FlawError(
            "incomplete", f"{len(missing)} of {len(names)} shards {verb} not there: {first}{more}",
            name=index,
        )  # fmt: skip
    return tuple(home + n for n in names)


def no_weights(files: Files, auto: str, home: str = "") -> FlawError:
    """`auto`: the class of transformers that reads and writes such a model."""
    found = min((n for n in files.names(home) if _PICKLES.fullmatch(n)), default="")
    if not found:
        return FlawError("incomplete", f"'{home}{WEIGHTS}' is not there", name=home + WEIGHTS)
    return FlawError(
        "config",
        f"the weights are a pickle ('{shown(found)}'), which is never read",
        f"convert them: {auto}.from_pretrained(folder).save_pretrained(folder) writes {WEIGHTS}",
        name=home + found,
    )


# companions -------------------------------------------------------------------------------------


def check_said(files: Files, home: str = "") -> None:
    """What lies beside config.json is whole as well, and asks for no code. Raises FlawError."""
    for name in _SAYS_MORE:
        if home + name in files.sizes and "auto_map" in files.fields(home + name):
            raise FlawError(
                "trust",
                "it asks for code from its own folder (auto_map), which is never run",
                f"remove 'auto_map' if {TOKENIZER} is all that the tokenizer needs",
                name=home + name,
            )


def need_tokenizer(files: Files, home: str = "") -> str:
    """Its name. Raises FlawError."""
    other = next((n for n in _OTHER_TOKENIZERS if home + n in files.sizes), "")
    make = "make one: AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    more = f", only '{other}'" if other else ""
    _need(files, home + TOKENIZER, make if other else STILL_COPYING, more)
    return home + TOKENIZER


@dataclass(frozen=True, slots=True)
class Modules:
    """What modules.json lists. `weights`: of the modules behind the encoder."""

    home: str = ""
    weights: tuple[str, ...] = ()


def modules_in(files: Files) -> Modules:
    """Raises FlawError for a module that is not there, or that is code."""
    if MODULES not in files.sizes:
        beside = next((n for n in _BESIDE_MODULES if n in files.sizes), "")
        if any(n.startswith("1_Pooling/") for n in files.sizes):
            beside = "1_Pooling"
        if beside:
            _need(files, MODULES, more=f", but '{beside}' is")
        return Modules()
    home = ""
    weights: list[str] = []
    for module in files.items(MODULES):
        package, _, kind = module.text("type").rpartition(".")
        if package.partition(".")[0] != "sentence_transformers":
            raise FlawError(
                "trust",
                f"it asks for the module '{shown(module.text('type'))}', which is code of its own "
                "and never run",
                "write a model.py (backend: torch_module or python)",
                name=MODULES,
            )
        folder = _folder_of(module.text("path"))
        if kind == "Transformer":
            home = folder
        elif folder:
            weights += _module(files, folder, kind)
    return Modules(home, tuple(weights))


def _folder_of(path: str) -> str:
    """ "" or "1_Pooling/"."""
    if path and (not _PLAIN.fullmatch(path) or path in (".", "..")):
        message = f"the path of a module is '{shown(path)}'"
        raise FlawError("link", message, "a module lies in a folder beside it", name=MODULES)
    return f"{path}/" if path else ""


def _module(files: Files, folder: str, kind: str) -> list[str]:
    weights, pickle = folder + WEIGHTS, f"{folder}pytorch_model.bin"
    if kind != "Normalize":  # which has nothing to say
        _need(files, folder + CONFIG)
        files.fields(folder + CONFIG)
    if weights in files.sizes:
        return [weights]
    if pickle in files.sizes:
        raise FlawError(
            "config",
            f"the weights of '{shown(folder)}' are a pickle, which is never read",
            "convert them: SentenceTransformer(folder).save(folder) writes safetensors",
            name=pickle,
        )
    if kind == "Dense":
        _need(files, weights)
    return []
