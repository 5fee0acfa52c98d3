"""Validation as an API server would do it, from schemas alone.

Custom resources: the CRD's schema, closed, since an API server that is asked to be strict refuses
unknown fields while JSON Schema lets them pass. Core kinds: ``kubernetes-validate``, strict.
"""

import copy
import json
import re
from functools import cache
from pathlib import Path

CRDS = Path(__file__).parents[1] / "data" / "crds"
KUBERNETES = "1.32"
FILES = {
    "RayService": "rayservices",
    "RayJob": "rayjobs",
    "PodMonitor": "podmonitors",
    "PrometheusRule": "prometheusrules",
}


class InvalidError(Exception):
    """A document breaks its schema."""


@cache
def crd_schema(kind):
    """The schema of a custom resource with every object closed to fields it does not name."""
    schema = json.loads((CRDS / f"{FILES[kind]}.v1.json").read_text())
    return _closed(schema)


def validate(document):
    """Check one rendered document, and every pod template in a custom resource.

    Raises:
        InvalidError: with the path and the reason.
    """
    if document["kind"] not in FILES:
        return _validate_core(document)
    import jsonschema

    schema = crd_schema(document["kind"])
    filled = with_defaults(schema, document)
    errors = jsonschema.Draft202012Validator(schema).iter_errors(filled)
    first = next(iter(errors), None)
    if first is not None:
        raise InvalidError(f"{'/'.join(map(str, first.absolute_path))}: {first.message}")
    # A CRD's schema leaves metadata open, its own and that of pod templates.
    _validate_core({"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]})
    for template in pod_templates(document):
        _validate_core({"apiVersion": "v1", "kind": "Pod", **template})
    return None


def with_defaults(schema, value):
    """A copy with the defaults that the API server fills in before it validates."""
    value = copy.copy(value)
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name not in value and "default" in part:
                value[name] = part["default"]
            elif name in value:
                value[name] = with_defaults(part, value[name])
    elif isinstance(value, list):
        value = [with_defaults(schema.get("items", {}), item) for item in value]
    return value


def pod_templates(document):
    """Every pod template, ``metadata`` and ``spec``, anywhere in a document."""
    if isinstance(document, list):
        for item in document:
            yield from pod_templates(item)
    elif isinstance(document, dict):
        for name, value in document.items():
            if name in ("template", "submitterPodTemplate") and "spec" in value:
                yield value
            else:
                yield from pod_templates(value)


def rules_used(schema, value, path=""):
    """CEL rules of the fields that a document sets."""
    found = [f"{path}: {rule['rule']}" for rule in schema.get("x-kubernetes-validations", ())]
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name in value:
                found += rules_used(part, value[name], f"{path}/{name}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += rules_used(schema.get("items", {}), item, f"{path}/{index}")
    return found


def _closed(node):
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {name: _closed(value) for name, value in node.items()}
    if isinstance(node.get("properties"), dict) and node.get("type") == "object":
        node.setdefault("additionalProperties", False)
    if isinstance(node.get("pattern"), str):  # RE2 takes flags inside the expression
        node["pattern"] = re.sub(r"^(\^)\(\?i\)(.*)$", r"(?i)\1\2", node["pattern"])
    return node


def _validate_core(document):
    import kubernetes_validate

    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        path = "/".join(map(str, error.absolute_path))
        raise InvalidError(f"{document['kind']}: {path}: {error.message}") from None
    except kubernetes_validate.SchemaNotFoundError as error:
        raise InvalidError(f"no schema: {error.message}") from None
