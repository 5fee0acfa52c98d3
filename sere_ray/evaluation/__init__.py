"""Measure what a rule costs and what it saves."""
