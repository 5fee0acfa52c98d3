"""The actor that owns the policy and tells every rank of it."""
