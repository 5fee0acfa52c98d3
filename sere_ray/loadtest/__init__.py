"""Latency and cost from outside: load on an OpenAI endpoint, policies compared in one run."""
