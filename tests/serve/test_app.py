"""Deployment files are validated before Ray or vLLM is touched."""

from pathlib import Path

import pytest
import yaml

from sere_ray.demo import assets
from sere_ray.errors import PolicyError, SereError
from sere_ray.serve import ServeConfig
from sere_ray.serve.app import engine_arguments

VALID = {"model": "/m", "model_id": "m"}


def test_policy_becomes_the_engine_option_and_the_users_arguments_win():
    policy = {"similarity": "a.safetensors", "select_top_k": 2}
    config = ServeConfig.parse({**VALID, "sere": policy, "engine": {"gpu_memory_utilization": 0.5}})
    arguments = engine_arguments(config)
    assert arguments["additional_config"]["sere"]["select_top_k"] == 2
    assert arguments["gpu_memory_utilization"] == 0.5


def test_without_a_policy_the_engine_is_stock():
    assert engine_arguments(ServeConfig.parse(VALID))["additional_config"] == {}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"modell": "x"}, SereError, ["modell = 'x'", "not permitted"]),
        ({"device": "tpu"}, SereError, ["device = 'tpu'", "'cpu'"]),
        ({"model": ""}, SereError, ["model = ''", "at least 1"]),
        ({"sere": {"select_top_k": 2}}, PolicyError, ["sere.similarity is missing"]),
    ],
)
def test_mistakes(changes, error, words, has_words):
    with pytest.raises(error) as caught:
        ServeConfig.parse({**VALID, **changes})
    has_words(str(caught.value), *words)


def test_deployment_files_are_valid():
    from ray.serve.schema import ServeDeploySchema

    root = Path(__file__).parents[2]
    files = sorted((root / "deploy").glob("*.yaml"))
    assert files
    for file in files:
        document = yaml.safe_load(file.read_text())
        ServeDeploySchema.model_validate(document)
        for application in document["applications"]:
            assert application["import_path"] == "sere_ray.serve:build_app"
            config = ServeConfig.parse(application["args"])
            assert (root / config.model).resolve() == assets.MODEL.resolve()
