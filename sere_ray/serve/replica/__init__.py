"""One rank: its Ray replica, its vLLM engine, and how it follows the policy."""
