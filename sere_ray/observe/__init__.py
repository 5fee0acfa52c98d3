"""Metrics, recording and alert rules, dashboards: what operators see of a deployment."""
