"""Deployment files are validated before Ray or vLLM is touched."""

import os
import socket
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from sere_ray import assets
from sere_ray.engine import plugin
from sere_ray.engine.plugin import check_will_load
from sere_ray.evaluation.tune import write_policy
from sere_ray.policy.key import parse_key
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.serve import ServeConfig, app, build_app, way
from sere_ray.serve.app import check_artifact, engine_arguments, llm_config
from sere_ray.serve.by_experts.router import DirectExpertsRouter, ExpertsRouter, ray_options
from sere_ray.serve.deployment_file import limits_of_proxies, load_file
from sere_ray.serve.policy_actor.auto_config import level_policies
from sere_ray.serve.replica import server
from sere_ray.serve.run import run_file
from sere_ray.util.errors import PolicyError, SereError, UnsupportedError

VALID = {"model": "/m", "model_id": "m"}


def test_policy_becomes_the_engine_option_and_the_users_arguments_win():
    policy = {"similarity": "a.safetensors", "select_top_k": 2}
    config = ServeConfig.parse({**VALID, "sere": policy, "engine": {"gpu_memory_utilization": 0.5}})
    arguments = engine_arguments(config)
    assert arguments["additional_config"]["sere"]["select_top_k"] == 2
    assert arguments["gpu_memory_utilization"] == 0.5


def test_the_key_of_a_file_may_hold_what_an_engine_takes_at_its_start():
    key = {"similarity": "a.safetensors", "select_top_k": 2, "dispatch": "all_to_all"}
    config = ServeConfig.parse({**VALID, "sere": key})
    assert config.sere == Policy.parse({k: v for k, v in key.items() if k != "dispatch"})
    assert engine_arguments(config)["additional_config"]["sere"]["dispatch"] == "all_to_all"


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_the_policy_may_be_a_file_as_tune_writes_it(tmp_path, mode):
    policy = {"similarity": "a.safetensors", "rule": "margin", "tau": [0.1, 0.2]}
    file = tmp_path / "policy.yaml"
    write_policy(policy, file)
    if mode == "auto":
        file.write_text("similarity: a.safetensors\nselect_top_k: 2\nmode: auto\n")
        policy = {"similarity": "a.safetensors", "select_top_k": 2, "mode": "off"}
        auto = {"auto": {"tpot_ms": 12, "levels": [{"select_top_k": 1}]}}
    config = ServeConfig.parse({**VALID, "sere": str(file), **(auto if mode == "auto" else {})})
    assert config.sere == Policy.parse(policy)
    assert config.starts_auto == (mode == "auto")


POLICY = {"similarity": "a.safetensors", "select_top_k": 2}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sere": POLICY}, "one gang leaves nothing to choose; set num_replicas"),
        ({"num_replicas": 2}, "needs a policy under `sere`.*`mode: off` keeps every answer exact"),
        ({"num_replicas": 2, "sere": POLICY, "request_router": "best"}, "'default' or 'experts'"),
    ],
)
def test_a_router_by_experts_that_could_not_work_is_refused(fields, words):
    with pytest.raises(SereError, match=words):
        ServeConfig.parse({**VALID, "request_router": "experts", **fields})


LOSSLESS = {**VALID, "device": "gpu", "data_parallel_size": 8, "engine": {"enable_eplb": True}}


def test_the_lossless_part_alone_needs_no_file(has_words):
    config = ServeConfig.parse({**LOSSLESS, "sere": {"rule": "none", "replicas": "by_experts"}})
    check_artifact(config)
    assert parse_key(config.engine_key) == (config.sere, Startup(replicas="by_experts"))
    given = llm_config(config).experimental_configs[server.OPTIONS]
    assert given["startup"] == {"replicas": "by_experts"}
    assert (given["policy"]["rule"], given["policy"]["similarity"]) == ("none", None)
    with pytest.raises(SereError) as caught:
        ServeConfig.parse({**LOSSLESS, "sere": {"rule": "none"}})
    has_words(str(caught.value), "sere.rule = 'none'", "replicas = 'by_experts'")
    auto = {"tpot_ms": 12, "levels": [{"select_top_k": 1}]}
    with pytest.raises(SereError) as caught:
        ServeConfig.parse(
            {**LOSSLESS, "auto": auto, "sere": {"rule": "none", "replicas": "by_experts"}}
        )
    has_words(str(caught.value), "auto", "names no file", "similarity")


def test_a_router_by_experts_is_told_to_ray(monkeypatch):
    fields = {**VALID, "num_replicas": 2, "sere": POLICY, "request_router": "experts"}
    options = llm_config(ServeConfig.parse(fields)).experimental_configs
    assert options[server.BY_EXPERTS] is True
    found = ray_options(is_direct=False)["request_router_config"]
    assert found["request_router_class"] is ExpertsRouter
    monkeypatch.delenv("RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY", raising=False)
    with pytest.raises(SereError, match="needs RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY=1"):
        ray_options(is_direct=True)
    with way.switched(way.DIRECT), way.prepared(way.DIRECT, way.Limits(), shows_bodies=True):
        found = ray_options(is_direct=True)["request_router_config"]
    assert found["request_router_class"] is DirectExpertsRouter
    assert "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY" not in os.environ


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({"sere": POLICY}, 0.005),
        ({"sere": POLICY, "score": {"share": 0.1, "max_tokens": 512}}, 0.1),
        ({"sere": POLICY, "score": {"share": 0}}, None),
        ({"sere": POLICY, "score": None}, None),
        ({}, None),
        ({"sere": POLICY, "engine": {"logprobs_mode": "processed_logprobs"}}, None),
        (
            {"sere": POLICY, "engine": {"disable_log_stats": True}, "metrics_interval_s": None},
            None,
        ),
    ],
)
def test_answers_are_scored_by_default_where_they_can_be(fields, share):
    config = ServeConfig.parse({**VALID, **fields})
    assert (None if config.scoring is None else config.scoring.share) == share
    assert llm_config(config).experimental_configs["sere_score"] == config.scoring


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"score": {"share": 0.1}}, ["score:", "needs a policy under `sere`"]),
        ({"sere": POLICY, "score": {"share": 2}}, ["score.share = 2", "less than or equal to 1"]),
        ({"sere": POLICY, "score": {"every": 2}}, ["score.every = 2", "not permitted"]),
        ({"sere": POLICY, "score": {"max_tokens": 1}}, ["score.max_tokens = 1", "equal to 2"]),
        ({"sere": POLICY, "score": {"queue": 0}}, ["score.queue = 0"]),
        ({"sere": POLICY, "score": {"timeout_s": 0}}, ["score.timeout_s = 0"]),
        ({"sere": POLICY, "score": {"wait_s": -1}}, ["score.wait_s = -1"]),
        (
            {"sere": POLICY, "score": {"share": 0.1}, "engine": {"max_logprobs": 0}},
            ["score:", "engine.max_logprobs = 0"],
        ),
    ],
)
def test_mistakes_in_score(fields, words, has_words):
    with pytest.raises(SereError) as caught:
        ServeConfig.parse({**VALID, **fields})
    has_words(str(caught.value), *words)


@pytest.mark.parametrize("plugins", ["", "lora_filesystem_resolver", "sered,other"])
def test_a_key_that_no_engine_would_act_on(monkeypatch, has_words, plugins):
    monkeypatch.setenv("VLLM_PLUGINS", plugins)
    policy = {"similarity": "a.safetensors", "select_top_k": 2}
    with pytest.raises(UnsupportedError) as error:
        build_app({**VALID, "sere": policy})
    has_words(str(error.value), f"VLLM_PLUGINS = {plugins!r}", "add 'sere'", "unset it")


def test_plugins_that_name_this_one(monkeypatch):
    for plugins in ("sere", "other,sere"):
        check_will_load({"VLLM_PLUGINS": plugins})
    check_will_load({})
    monkeypatch.setattr(plugin, "entry_points", lambda **_: ())
    with pytest.raises(UnsupportedError, match="not installed as a package"):
        check_will_load({})


def test_without_a_policy_the_engine_is_stock():
    assert engine_arguments(ServeConfig.parse(VALID))["additional_config"] == {}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"modell": "x"}, SereError, ["modell = 'x'", "not permitted"]),
        ({"device": "tpu"}, SereError, ["device = 'tpu'", "'cpu'"]),
        ({"data_parallel_size": 0}, SereError, ["data_parallel_size = 0", "greater than or equal"]),
        ({"engine": {"data_parallel_size": 2}}, SereError, ["data_parallel_size is set by"]),
        ({"engine": {"additional_config": {}}}, SereError, ["additional_config is set by"]),
        (
            {"device": "gpu", "engine": {"tensor_parallel_size": 2}},
            SereError,
            ["engine.tensor_parallel_size = 2", "one GPU", "data_parallel_size"],
        ),
        (
            {"env": {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}},
            SereError,
            ["VLLM_ALLOW_INSECURE_SERIALIZATION lets clients run code"],
        ),
        (
            {"engine": {"disable_log_stats": True}},
            SereError,
            ["engine.disable_log_stats", "metrics_interval_s: null"],
        ),
        ({"access": {"max_body": 1}}, SereError, ["access.max_body = 1", "not permitted"]),
        ({"access": {"max_body_bytes": 1}}, SereError, ["access.max_body_bytes = 1"]),
        ({"startup": {}}, SereError, ["startup: write its keys under `sere`"]),
        ({"model": ""}, SereError, ["model = ''", "at least 1"]),
        (
            {"sere": {"similarity": "a", "select_top_k": 2, "dispatch": "x"}},
            PolicyError,
            ["sere.dispatch = 'x'"],
        ),
        ({"sere": {"select_top_k": 2}}, PolicyError, ["sere.similarity is missing"]),
    ],
)
def test_mistakes(changes, error, words, has_words):
    with pytest.raises(error) as caught:
        ServeConfig.parse({**VALID, **changes})
    has_words(str(caught.value), *words)


@pytest.mark.parametrize(
    "changes",
    [
        {"model_id": None},
        {"startup": {}},
        {"env": {"VLLM_SERVER_DEV_MODE": "1", "HF_TOKEN": "secret"}},
        {"env": {"HF_TOKEN": ["secret"]}},
        {"auto": {"tpot_ms": 5, "levels": [{"select_top_k": 1}]}},
    ],
)
def test_no_message_shows_the_environment_of_the_engines(changes):
    value = {**VALID, "env": {"HF_TOKEN": "secret"}, **changes}
    with pytest.raises(SereError) as caught:
        ServeConfig.parse({k: v for k, v in value.items() if v is not None})
    assert "secret" not in str(caught.value)


def test_deployment_files_are_valid(tmp_path, monkeypatch):
    from ray.serve.schema import ServeDeploySchema

    root = Path(__file__).parents[2]
    monkeypatch.chdir(tmp_path)  # where `sere-ray tune` has written the policy that some name
    write_policy({"similarity": "model.safetensors", "select_top_k": 2}, Path("policy.yaml"))
    files = sorted((root / "deploy").glob("*.yaml"))
    assert files
    for file in files:
        document = yaml.safe_load(file.read_text())
        ServeDeploySchema.model_validate(document)
        for application in document["applications"]:
            assert application["import_path"] == "sere_ray.serve:build_app"
            config = ServeConfig.parse(application["args"])
            if config.auto is not None:
                level_policies(config.sere, config.auto, top_k=4)
            load_file(file)
            if config.device == "cpu":
                assert (root / config.model).resolve() == assets.MODEL.resolve()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", ["not YAML"]),
        ("- 1", ["not a Ray Serve file"]),
        ("applications: [{import_path: 'a:b', args: {}}]", ["import_path = 'a:b'", "serve run"]),
        (
            "applications: [{import_path: 'sere_ray.serve:build_app', args: {model: m}}]",
            ["model_id", "required"],
        ),
        ("applications: []\nproxy_location: HeadOnly", ["proxy_location", "serve deploy"]),
        (
            "http_options: {request_timeout_s: 3}\napplications: []",
            ["http_options.request_timeout_s", "limits.answer_s"],
        ),
        (
            "http_options: {keep_alive_timeout_s: 3}\napplications: []",
            ["http_options.keep_alive_timeout_s", "limits.idle_s"],
        ),
        (
            "applications: [{import_path: 'sere_ray.serve:build_app', args: {model: m, "
            "model_id: m, limits: {header_s: 0}}}]",
            ["limits.header_s = 0", "greater than"],
        ),
        (
            "applications: [{import_path: 'sere_ray.serve:build_app', deployments: []}]",
            ["applications.0.deployments", "name, import_path, args, route_prefix", "serve deploy"],
        ),
    ],
)
def test_mistakes_in_a_deployment_file(tmp_path, has_words, text, words):
    file = tmp_path / "file.yaml"
    file.write_text(text)
    with pytest.raises(SereError) as caught:
        load_file(file)
    has_words(str(caught.value), *words)
    with pytest.raises(SereError) as caught:
        load_file(tmp_path / "missing.yaml")
    has_words(str(caught.value), "missing.yaml", "No such file", "sere-ray examples")


def test_an_artifact_that_is_not_here_is_said_before_anything_starts(tmp_path, has_words):
    policy = {"similarity": str(tmp_path / "none.safetensors"), "select_top_k": 2}
    arguments = {"model": str(assets.MODEL), "model_id": "m", "sere": policy}
    application = {"name": "a", "import_path": "sere_ray.serve:build_app", "args": arguments}
    file = tmp_path / "file.yaml"
    file.write_text(yaml.safe_dump({"applications": [application]}))
    with pytest.raises(SereError) as caught:
        run_file(file, Console(quiet=True))
    has_words(str(caught.value), "none.safetensors", "No such file", "sere-ray calibrate")


def test_a_port_that_another_deployment_has_is_refused(tmp_path, has_words):
    """Ray's proxy would listen on it, too, and get every other request."""
    arguments = {"model": str(assets.MODEL), "model_id": "m"}
    application = {"name": "a", "import_path": "sere_ray.serve:build_app", "args": arguments}
    file = tmp_path / "file.yaml"
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        document = {"http_options": {"port": port}, "applications": [application]}
        file.write_text(yaml.safe_dump(document))
        with pytest.raises(SereError) as caught:
            run_file(file, Console(quiet=True))
    has_words(str(caught.value), "file.yaml", f"http_options.port = {port}", "already in use")


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_one_file_shape_for_one_rank_and_gangs_on_cpu_and_gpu(device):
    """The engines of a file, without starting them."""
    from sere_ray.serve.replica import server

    base = {"model": str(assets.MODEL), "model_id": "m", "device": device}
    one = llm_config(ServeConfig.parse(base))
    gang = llm_config(ServeConfig.parse({**base, "data_parallel_size": 2, "num_replicas": 3}))
    assert (one.server_cls, gang.server_cls) == (server.SereServer, server.SereGangServer)
    assert "data_parallel_size" not in one.engine_kwargs
    assert gang.engine_kwargs["data_parallel_size"] == 2
    assert gang.engine_kwargs["enable_expert_parallel"] is True
    assert gang.deployment_config["num_replicas"] == 3
    (bundle,) = gang.placement_group_config["bundles"]
    assert gang.deployment_config["ray_actor_options"]["num_gpus"] == (device == "gpu")
    # two gangs of two and the ingress fit into two cores
    assert device == "gpu" or 4 * bundle["CPU"] + 0.5 <= 2


def test_a_file_without_policy_has_no_router_actor():
    from sere_ray.serve.replica import server

    config = ServeConfig.parse({"model": str(assets.MODEL), "model_id": "m"})
    assert server.OPTIONS not in llm_config(config).experimental_configs


def test_applications_behind_one_proxy_agree_on_its_limits(tmp_path):
    def served(*limits):
        return [ServeConfig.parse({**VALID, "limits": each}) for each in limits]

    path = tmp_path / "file.yaml"
    assert limits_of_proxies(path, served({"answer_s": 3}, {})).header_s == 10
    assert limits_of_proxies(path, []).answer_s is None
    with pytest.raises(SereError, match="the same, but for answer_s"):
        limits_of_proxies(path, served({"header_s": 3}, {}))


def test_behind_haproxy_nobody_is_served_without_keys(monkeypatch, has_words):
    from sere_ray.serve import build_app

    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(SereError) as caught:
        build_app({"model": str(assets.MODEL), "model_id": "m"})
    has_words(str(caught.value), "access.keys_file", "HAProxy", "sere-ray key")


def test_a_vllm_that_ray_cannot_serve_is_refused_before_ray_starts(monkeypatch, has_words):
    monkeypatch.setattr(app, "installed_vllm", lambda: ("vllm", "0.33.0"))
    path = Path(__file__).parents[2] / "deploy" / "demo-cpu.yaml"
    for start in (lambda: build_app(VALID), lambda: run_file(path, Console())):
        with pytest.raises(UnsupportedError) as error:
            start()
        words = ("vllm 0.33.0", "Ray 2.60.0", "below 0.33", "constraints/gpu.txt", "vllm serve")
        has_words(str(error.value), *words)
