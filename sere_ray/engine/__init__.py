"""Everything that knows vLLM. Nothing outside this package imports vLLM internals."""
