"""Answers given in advance: what a real engine would have thought at each of their tokens."""

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

OPTIONS = {"logits_processors": ["tests.engine.forced:Forced"], "max_logprobs": -1}
"""Of an engine that is asked for :func:`log_probs`."""


class Forced(AdapterLogitsProcessor):
    """Allows at each position the one token that ``extra_args["forced"]`` names."""

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        forced = (params.extra_args or {}).get("forced")
        if forced is None:
            return None

        def only(output_ids, logits):
            allowed = torch.full_like(logits, float("-inf"))
            allowed[forced[len(output_ids)]] = 0.0
            return allowed

        return only


def log_probs(engine, requests, answers):
    """Log-probabilities of every token at every position of the answers, before they were forced.

    The answers are as long as each other, so that all requests decode in step.

    Returns:
        float32 ``[requests, positions, vocabulary]``.
    """
    from vllm import SamplingParams

    parameters = [
        SamplingParams(
            max_tokens=len(answer),
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            logprobs=-1,
            flat_logprobs=True,
            extra_args={"forced": list(answer)},
        )
        for answer in answers
    ]
    outputs = engine.generate(requests, parameters, use_tqdm=False)
    return torch.stack([_dense(o.outputs[0], a) for o, a in zip(outputs, answers, strict=True)])


def _dense(output, answer):
    assert list(output.token_ids) == list(answer)
    found, rows = output.logprobs, []
    for start, end in zip(found.start_indices, found.end_indices, strict=True):
        ids = torch.tensor(found.token_ids[start:end])
        row = torch.full((int(ids.max()) + 1,), float("nan"))
        row[ids] = torch.tensor(found.logprobs[start:end])
        rows.append(row)
    return torch.stack(rows)
