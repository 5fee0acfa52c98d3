#!/bin/bash
# Docker's health check: does Serve's proxy on this machine answer? healthcheck.sh [PORT]
# (Kubernetes does not use it; KubeRay's probes ask the same.)
wget --quiet --tries 1 --timeout 2 --output-document - "http://127.0.0.1:${1:-8000}/-/healthz" | grep -q success
