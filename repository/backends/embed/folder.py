"""What an encoder's folder says about itself, as sentence-transformers lays it out.

    modules.json                        which modules, in which order, in which folders
    config.json, *.safetensors          the encoder: at the top, or in a folder of its own
    tokenizer.json, tokenizer_config.json
    sentence_bert_config.json           (or another encoder's name there) max_seq_length, do_lower_case;
                                        newer ones leave the length to tokenizer_config.json
    1_Pooling/config.json               how tokens become one vector
    2_Dense/config.json, model.safetensors
    config_sentence_transformers.json   prompts

Old and new names of modules and keys mean the same. A folder without modules.json is any encoder:
its tokens are averaged and the vector is brought to length 1, unless the options say otherwise.
Only JSON is read here; a module that is not known by name is refused, code of a folder never runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from repository.backends import registry
from repository.errors import IncompleteFilesError, LoadFailedError, UntrustedCodeError

MAX_JSON = 16 << 20  # bytes
HOME = "sentence_transformers."
NO_FILE = "sentence_bert_config.json"
KNOWN = ("Transformer", "Pooling", "Dense", "Normalize")
DEFAULT_TOKENS = 512  # where neither the folder nor the options set a limit
# What older pooling configs call the modes, in the order in which they are joined.
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
MODES = tuple(FLAGS.values())
# Encoders whose first position is not 0 but the one after that of the padding.
FROM_PADDING = frozenset(
    {"camembert", "data2vec-text", "longformer", "mpnet", "roberta", "roberta-prelayernorm",
     "xlm-roberta", "xlm-roberta-xl", "xmod"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer behind the pooling; its weights lie in `folder`."""

    folder: Path
    inputs: int
    outputs: int
    bias: bool
    activation: str | None  # the full name of a class of torch.nn; None: none
    residual: bool


Step: TypeAlias = Dense | Literal["normalize"]


@dataclass(frozen=True, slots=True)
class EncoderFolder:
    """`encoder`: where config.json, weights and tokenizer lie; `config`: that file's content.

    pooling         modes whose vectors are joined, in order
    include_prompt  the prompt's tokens take part in the pooling
    steps           what follows the pooling
    most_tokens     of one text; a longer one is cut
    prompt          put in front of every text
    assumed         what the folder does not say and the options do not either
    """

    encoder: Path
    config: Mapping[str, Any]
    pooling: tuple[str, ...] = ("mean",)
    include_prompt: bool = True
    steps: tuple[Step, ...] = ("normalize",)
    most_tokens: int = DEFAULT_TOKENS
    cut: Literal["left", "right"] = "right"
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    prompt: str = ""
    assumed: tuple[str, ...] = ()

    @property
    def normalizes(self) -> bool:
        return bool(self.steps) and self.steps[-1] == "normalize"


def read_folder(root: Path, options: Mapping[str, Any]) -> EncoderFolder:
    """`options` of the model's config: pooling, normalize, max_tokens.

    Raises IncompleteFilesError, LoadFailedError, UntrustedCodeError; texts name files, not paths.
    """
    if (root / "modules.json").is_file():
        found = _with_modules(root)
    else:
        found = EncoderFolder(root, _model_config(root), assumed=("no modules.json",))
    found = _with_options(found, options)
    prompts, prompt = _prompts(root)
    said = _json(min(found.encoder.glob("sentence_*_config.json"), default=found.encoder / NO_FILE))
    tokenizer = _json(found.encoder / "tokenizer_config.json")
    found = replace(
        found,
        prompts=prompts,
        prompt=prompt,
        lower_case=bool(said.get("do_lower_case", False)),
        cut="left" if tokenizer.get("truncation_side") == "left" else "right",
    )
    return _with_limit(
        found, said.get("max_seq_length"), tokenizer.get("model_max_length"), options
    )


# modules ----------------------------------------------------------------------------------------


def _with_modules(root: Path) -> EncoderFolder:
    modules = [_module(root, each) for each in _listed(root)]
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or not {"Dense", "Normalize"}.issuperset(kinds[2:]):
        raise LoadFailedError(
            f"modules.json lists {', '.join(kinds) or 'nothing'}; served are Transformer, Pooling, "
            "then any of Dense and Normalize"
        )
    (_, encoder), (_, pooling), *rest = modules
    modes, include_prompt = _pooling(pooling)
    steps: list[Step] = []
    for kind, folder in rest:
        said = _json(folder / "config.json", required=kind == "Dense")
        _check_pooled(kind, said)
        steps.append(_dense(folder, said) if kind == "Dense" else "normalize")
    config = _model_config(encoder)
    return EncoderFolder(encoder, config, modes, include_prompt, tuple(steps))


def _listed(root: Path) -> list[Mapping[str, Any]]:
    listed = _any_json(root / "modules.json")
    try:
        return sorted(listed, key=lambda each: int(each.get("idx", 0)))
    except (TypeError, ValueError, AttributeError) as error:
        raise LoadFailedError("modules.json is not a list of modules") from error


def _module(root: Path, said: Mapping[str, Any]) -> tuple[str, Path]:
    """Its kind and its folder."""
    name = str(said.get("type", ""))
    kind = name.rpartition(".")[2]
    if not name.startswith(HOME) or kind not in KNOWN:
        raise LoadFailedError(
            f"modules.json has a module of type '{name}'; known are {', '.join(KNOWN)} of "
            "sentence-transformers, and code that a folder brings is never run"
        )
    path = str(said.get("path", ""))
    folder = (root / path).resolve()
    if not folder.is_relative_to(root.resolve()):
        raise LoadFailedError(f"modules.json names the folder '{path}', outside the model's own")
    return kind, folder


def _pooling(folder: Path) -> tuple[tuple[str, ...], bool]:
    said = _json(folder / "config.json", required=True)
    new = said.get("pooling_mode")
    if new is None:
        modes = tuple(mode for flag, mode in FLAGS.items() if said.get(flag)) or ("mean",)
    else:
        modes = (new,) if isinstance(new, str) else tuple(map(str, new))
    return _known_modes(modes, folder.name), bool(said.get("include_prompt", True))


def _known_modes(modes: tuple[str, ...], where: str) -> tuple[str, ...]:
    for mode in modes:
        if mode not in MODES:
            raise LoadFailedError(
                f"{where}: there is no pooling '{mode}'; there are {', '.join(MODES)}"
            )
    return modes


def _check_pooled(kind: str, said: Mapping[str, Any]) -> None:
    """Modules may name what they work on; the vector of the whole text is all that we have."""
    for key in ("module_input_name", "module_output_name"):
        if said.get(key) not in (None, "sentence_embedding"):
            raise LoadFailedError(
                f"a {kind} module has {key} '{said[key]}'; only sentence_embedding is served"
            )


def _dense(folder: Path, said: Mapping[str, Any]) -> Dense:
    try:
        return Dense(
            folder=folder,
            inputs=int(said["in_features"]),
            outputs=int(said["out_features"]),
            bias=bool(said.get("bias", True)),
            activation=said.get("activation_function", "torch.nn.modules.activation.Tanh"),
            residual=bool(said.get("use_residual", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LoadFailedError(
            f"{folder.name}/config.json must have in_features and out_features"
        ) from error


# options, limits, prompts -------------------------------------------------------------------------


def _with_options(found: EncoderFolder, options: Mapping[str, Any]) -> EncoderFolder:
    said = dict(options)
    bare = bool(found.assumed)
    assumed = []
    pooling = registry.option(said, "pooling", str, None)
    if pooling is not None:
        modes = _known_modes(tuple(pooling.split("+")), "options.pooling")
        found = replace(found, pooling=modes)
    elif bare:
        assumed.append("pooling: mean")
    normalize = registry.option(said, "normalize", bool, None)
    if normalize is not None:
        kept = tuple(step for step in found.steps if step != "normalize")
        found = replace(found, steps=(*kept, "normalize") if normalize else kept)
    elif bare:
        assumed.append("normalize: true")
    return replace(found, assumed=tuple(assumed))


def _with_limit(
    found: EncoderFolder, said: Any, of_tokenizer: Any, options: Mapping[str, Any]
) -> EncoderFolder:
    """The options' limit, else the folder's, never more than the encoder has positions."""
    positions = _positions(found.config)
    asked = registry.option(dict(options), "max_tokens", int, None)
    if asked is not None:
        if asked < 1 or (positions and asked > positions):
            most = f"; the encoder has {positions} positions" if positions else ""
            raise LoadFailedError(f"options.max_tokens is {asked}; it must be 1 or more{most}")
        return replace(found, most_tokens=asked)
    # A tokenizer without a limit has one of about 1e30.
    limits = [
        n for n in (said or of_tokenizer, positions) if isinstance(n, int) and 0 < n < 1 << 24
    ]
    if limits:
        return replace(found, most_tokens=min(limits))
    assumed = (*found.assumed, f"max_tokens: {DEFAULT_TOKENS}")
    return replace(found, most_tokens=DEFAULT_TOKENS, assumed=assumed)


def _positions(config: Mapping[str, Any]) -> int:
    """How many positions the encoder has; 0: any number."""
    count = config.get("max_position_embeddings")
    if not isinstance(count, int) or count < 1:
        return 0
    if config.get("model_type") in FROM_PADDING:
        padding = config.get("pad_token_id")
        return count - 1 - (padding if isinstance(padding, int) else 1)
    return count


def _prompts(root: Path) -> tuple[dict[str, str], str]:
    """All by name, and the one that goes in front of every text."""
    said = _json(root / "config_sentence_transformers.json")
    listed = said.get("prompts") or {}
    if not isinstance(listed, dict):
        raise LoadFailedError("config_sentence_transformers.json: prompts is not an object")
    prompts = {str(name): str(text or "") for name, text in listed.items()}
    default = said.get("default_prompt_name")
    if default is None:
        return prompts, ""
    if default not in prompts:
        raise LoadFailedError(
            f"config_sentence_transformers.json has the default prompt '{default}', "
            f"but the prompts {', '.join(sorted(prompts)) or 'none'}"
        )
    return prompts, prompts[default]


# files ------------------------------------------------------------------------------------------


def _model_config(encoder: Path) -> Mapping[str, Any]:
    config = _json(encoder / "config.json", required=True)
    named = config.get("auto_map")
    if named:
        names = (
            ", ".join(f"{k}: {v}" for k, v in named.items()) if isinstance(named, dict) else named
        )
        raise UntrustedCodeError(
            f"config.json asks for code of the folder's own (auto_map: {names}), which is never "
            "run; use a model whose architecture transformers itself has"
        )
    if not config.get("model_type"):
        raise LoadFailedError("config.json has no model_type, so nobody knows what encoder it is")
    return config


def _json(path: Path, *, required: bool = False) -> Mapping[str, Any]:
    """An object; {} where the file is not there and need not be."""
    if not required and not path.is_file():
        return {}
    found = _any_json(path)
    if not isinstance(found, dict):
        raise LoadFailedError(f"{path.name} is not a JSON object")
    return found


def _any_json(path: Path) -> Any:
    shown = path.name if path.name != "config.json" else f"{path.parent.name}/{path.name}"
    try:
        if path.stat().st_size > MAX_JSON:
            raise LoadFailedError(f"{shown} is larger than {MAX_JSON} bytes")
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise IncompleteFilesError(f"{shown} is missing") from error
    except (ValueError, RecursionError) as error:
        raise IncompleteFilesError(f"{shown} is not whole JSON: {error}") from error
