"""A tokenizer for models that are shapes only: the demo's, with a word for each further token."""

import json
import shutil
from pathlib import Path

from sere_ray import assets

_FILES = ("tokenizer_config.json", "chat_template.jinja")


def write_tokenizer(folder: Path, vocabulary: int) -> None:
    """Write one that encodes text as the demo's does and decodes every id of a vocabulary.

    Args:
        folder: of the model.
        vocabulary: tokens that the model may put out; at least the demo's.
    """
    content = json.loads((assets.MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    tokens: dict[str, int] = content["model"]["vocab"]
    # No merge leads to them, so no text is encoded with them. Ġ is the space of byte-level BPE.
    tokens.update({f"Ġw{number}": number for number in range(len(tokens), vocabulary)})
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for name in _FILES:
        shutil.copy(assets.MODEL / name, folder / name)
