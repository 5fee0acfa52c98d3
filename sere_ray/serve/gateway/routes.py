"""Routes that are served: vLLM's, as far as they know keys, tiers and limits, and our own below
``/sere/``."""

MODELS = "/v1/models"
WITH_BODY = frozenset({"/v1/completions", "/v1/chat/completions"})
"""Where a client's JSON goes to an engine: no other route of vLLM's takes a body."""
HEALTH = "/health"
"""Answers without a key, for load balancers."""
SERVED = WITH_BODY | {MODELS, HEALTH}
"""Paths of vLLM's application that stay; those beside these may not know the tiers."""
