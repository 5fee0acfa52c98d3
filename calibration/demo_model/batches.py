"""Token tensors for the training loop: one stream of source, and rows of whole chats."""

from itertools import chain

import corpus
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

SOURCE_LENGTH, CHAT_LENGTH = 1024, 256


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Token ids of many texts, encoded in parallel."""
    batch = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [item.ids for item in batch]


def source_stream(tokenizer: PreTrainedTokenizerFast, texts: dict[str, str]) -> Tensor:
    """All documents in one row, each preceded by the end-of-text token."""
    documents = encode(tokenizer, [corpus.END + text for text in texts.values() if text])
    return torch.tensor(list(chain.from_iterable(documents)), dtype=torch.int32)


def chat_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> Tensor:
    """Rows of whole chats, in order and padded, so that each row starts as a request does."""
    length, pad = CHAT_LENGTH + 1, tokenizer.pad_token_id
    rows: list[list[int]] = [[]]
    for ids in encode(tokenizer, texts):
        if len(rows[-1]) + len(ids) > length:
            rows[-1] += [pad] * (length - len(rows[-1]))
            rows.append([])
        rows[-1] += ids
    rows[-1] += [pad] * (length - len(rows[-1]))
    return torch.tensor(rows, dtype=torch.int16)


def windows(stream: Tensor, starts: Tensor) -> Tensor:
    """The rows of the stream that begin at the given positions."""
    offsets = torch.arange(SOURCE_LENGTH + 1, device=stream.device)
    return stream[starts.unsqueeze(1) + offsets].long()
