"""Opening a Hugging Face checkpoint: no code of the checkpoint is run, no pickle file read."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash

from sere_ray.util.errors import SereError

DTYPES = ("auto", "bfloat16", "float32")


def load_config(model: str, revision: str | None = None) -> PretrainedConfig:
    """Read the configuration of a local folder, a config file, or a model of the hub.

    Raises:
        SereError: there is none, or transformers does not know the model type.
    """
    path = Path(model).expanduser()
    if path.is_dir() and not (path / "config.json").is_file():
        raise SereError(f"model = {model!r}: the folder has no config.json; give a checkpoint")
    if not path.exists() and (path.is_absolute() or model.startswith((".", "~"))):
        raise SereError(f"model = {model!r}: no such folder; give a checkpoint or a hub name")
    with _one_line(model, "configuration"):
        return AutoConfig.from_pretrained(_location(model), revision=revision)


def load_tokenizer(model: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Raises:
        SereError: it has none.
    """
    with _one_line(model, "tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(_location(model), revision=revision)
    # transformers makes an empty tokenizer for a folder that has only a config.json
    if not tokenizer("a b")["input_ids"]:
        raise SereError(f"model = {model!r}: has no tokenizer; add its tokenizer.json")
    return tokenizer


def load_model(
    model: str, *, revision: str | None, device: torch.device, dtype: torch.dtype | str
) -> PreTrainedModel:
    """Load the weights.

    Args:
        model: local folder or hub name.
        revision: commit or branch of a hub model.
        device: where the whole model goes.
        dtype: of the weights; ``auto`` is the checkpoint's.

    Raises:
        SereError: no safetensors weights, or some of the model's weights are not among them.
    """
    auto_class = _auto_class(load_config(model, revision))
    with _one_line(model, "weights"), quiet():
        loaded, info = auto_class.from_pretrained(
            _location(model),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would leave them at random values
        raise SereError(
            f"model = {model!r}: {len(missing)} weights are missing, the first is "
            f"{missing[0]!r}; the checkpoint is incomplete or of another architecture"
        )
    return loaded.to(device).eval()


def empty_model(config: PretrainedConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model of a configuration on the meta device: structure without memory.

    Args:
        config: of :func:`load_config`.
        dtype: of the weights; None = the configuration's.

    Raises:
        SereError: transformers has no causal language model for it, with or without images.
    """
    name = config.name_or_path or config.model_type
    with _one_line(name, "architecture"), quiet(), torch.device("meta"):
        empty: PreTrainedModel = _auto_class(config).from_config(
            config, dtype=dtype or config.dtype
        )
        return empty


def _auto_class(config: PretrainedConfig) -> Any:
    """What makes the causal language model of a configuration, with or without images."""
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto_class._model_mapping:
            return auto_class
    return AutoModelForCausalLM  # which says what it lacks


def resolved_revision(model: str, revision: str | None) -> str | None:
    """The commit a hub model's name and revision stand for; None for a local folder."""
    if is_local(model):
        return None
    with _one_line(model, "configuration"):
        path = cached_file(model, "config.json", revision=revision)
    commit: str | None = extract_commit_hash(path, None)
    return commit


def pick_device(device: str) -> torch.device:
    """``auto`` is the first GPU, or the CPU.

    Raises:
        SereError: not a device of this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = "not a CPU or CUDA device"
    try:
        if device.split(":")[0] in ("cpu", "cuda"):
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
    raise SereError(
        f"device = {device!r}: not usable ({reason}); allowed: auto, cpu, cuda, cuda:<i>"
    )


def check_dtype(dtype: str) -> None:
    """Refuse what is not one of ``DTYPES``.

    Raises:
        SereError: names them.
    """
    if dtype not in DTYPES:
        raise SereError(f"dtype = {dtype!r}: must be one of {', '.join(DTYPES)}")


def pick_dtype(dtype: str, device: torch.device, config: PretrainedConfig) -> torch.dtype:
    """The dtype of the weights: ``auto`` is the checkpoint's on a GPU and float32 on a CPU, which
    is faster there."""
    if dtype != "auto":
        picked: torch.dtype = getattr(torch, dtype)
        return picked
    return torch.float32 if device.type == "cpu" else config.dtype or torch.float32


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the progress bars and warnings of transformers while the block runs."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def is_local(model: str) -> bool:
    """Whether a model is a folder or file of this machine, not a name on the hub."""
    return Path(model).expanduser().exists()


def model_name(model: str) -> str:
    """What an artifact calls a model: a folder's own name, without the path of one machine."""
    return Path(model).expanduser().resolve().name if is_local(model) else model


def _location(model: str) -> str:
    return str(Path(model).expanduser()) if is_local(model) else model


@contextmanager
def _one_line(model: str, what: str) -> Iterator[None]:
    """Turn the errors of transformers and the hub, which come in paragraphs, into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SereError(
            f"model = {model!r}: cannot load its {what} ({reason}); give a local checkpoint "
            "folder or a hub name that is cached or reachable"
        ) from None
