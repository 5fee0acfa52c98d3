"""Ours behind Ray's proxy against plain vLLM, request by request; ``test_direct_streaming.py`` has
the other way."""

import pytest

from tests.serve.every_path import check_as_vllm

pytestmark = pytest.mark.engine


def test_answers_as_vllm(live, of_vllm):
    check_as_vllm(live, of_vllm, "default")
