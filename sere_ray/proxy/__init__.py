"""What runs in the proxies, before a request reaches a replica; it imports nothing heavy."""
