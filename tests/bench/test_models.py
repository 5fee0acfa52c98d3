"""The tokenizer of models that are shapes only."""

from transformers import AutoTokenizer

from sere_ray import assets
from sere_ray.bench.models import PUBLIC, write_tokenizer


def test_it_encodes_like_the_demos_and_decodes_every_id(tmp_path):
    size = PUBLIC["qwen3-30b-a3b"]["vocab_size"]
    write_tokenizer(tmp_path, size)
    own, demo = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path, assets.MODEL))
    text = "time year w1500 people"
    assert own.encode(text) == demo.encode(text)
    assert own.decode([1024, size - 1]) == f" w1024 w{size - 1}"
    messages = [{"role": "user", "content": text}]
    assert own.apply_chat_template(messages, tokenize=False) == demo.apply_chat_template(
        messages, tokenize=False
    )
