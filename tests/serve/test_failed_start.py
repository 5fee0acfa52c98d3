"""Why a start failed: what is known before anything starts, and what logs say afterwards."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from rich.console import Console

from sere_ray import assets
from sere_ray.serve import engine_check, run, way
from sere_ray.serve.config import ServeConfig
from sere_ray.serve.engine_check import check_engine, check_model
from sere_ray.serve.failed_start import failure, reason
from sere_ray.util import temporary
from sere_ray.util.errors import SereError

OURS = {"model": str(assets.MODEL), "model_id": "m"}


def config(**changes):
    return ServeConfig.parse({**OURS, **changes})


@pytest.mark.parametrize("model", ["/no/such/model", "./model", "~/nothing", "a/b/c", "nothing"])
def test_no_such_model(model, has_words):
    with pytest.raises(SereError) as error:
        check_model(config(model=model))
    has_words(str(error.value), f"model = '{model}'", "no such folder")


def test_a_folder_that_is_no_checkpoint(tmp_path, has_words):
    with pytest.raises(SereError) as error:
        check_model(config(model=str(tmp_path)))
    has_words(str(error.value), str(tmp_path), "config.json", "No such file", "checkpoint")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(SereError, match="not JSON"):
        check_model(config(model=str(tmp_path)))
    check_model(config(model="Qwen/Qwen3-30B-A3B"))  # a hub's name: only the hub knows


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"max_modl_len": 64}, ["engine.max_modl_len = 64", "did you mean 'max_model_len'"]),
        ({"zzzzz": 1}, ["engine.zzzzz = 1", "vllm serve --help"]),
        ({"max_model_len": 10**6}, ["vLLM refuses", "1000000", "max_model_len"]),
        ({"dtype": "float99"}, ["vLLM refuses", "float99"]),
    ],
)
def test_arguments_that_vllm_refuses(engine, words, has_words):
    with pytest.raises(SereError) as error:
        check_engine(config(engine=engine))
    has_words(str(error.value), *words)
    assert "\n" not in str(error.value)


def test_arguments_that_vllm_takes():
    check_engine(config(engine={"max_model_len": 64, "enforce_eager": True}))
    check_engine(config(engine={"enable_prompt_tokens_details": True}))  # of vLLM's HTTP server


@pytest.mark.parametrize(
    ("changes", "first", "words"),
    [
        ({"model": "/no/such"}, "start_ray", "no such folder"),
        ({"engine": {"max_modl_len": 1}}, "deploy_all", "did you mean"),
    ],
    ids=["before Ray starts", "before a replica does"],
)
def test_a_file_is_refused_early(tmp_path, monkeypatch, changes, first, words):
    """vLLM, which knows its arguments, is imported while Ray starts."""
    for name in ("start_ray", "start_serve", "imported_beside"):
        monkeypatch.setattr(run, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(run, first, lambda *_, **__: pytest.fail(first))
    monkeypatch.setattr(engine_check, "_build", lambda arguments: None)
    application = {"import_path": "sere_ray.serve:build_app", "args": {**OURS, **changes}}
    file = tmp_path / "file.yaml"
    file.write_text(json.dumps({"applications": [application]}))
    with pytest.raises(SereError, match=words):
        run.run_file(file, Console(quiet=True))


def status(message, state="DEPLOYING", of_application=""):
    deployments = {"d": SimpleNamespace(message=message)}
    application = SimpleNamespace(status=state, message=of_application, deployments=deployments)
    return SimpleNamespace(applications={"app": application})


def test_the_first_replica_that_fails_ends_the_start():
    assert failure(status(""), "app") is None
    assert failure(status("waiting for resources"), "app") is None
    assert failure(status(""), "another") is None
    assert failure(status("A replica failed to start with exception. Retrying"), "app")


def test_an_application_that_failed_ends_the_start_whatever_it_says():
    """The start waits for as long as nothing has failed."""
    failed = "DEPLOY_FAILED"
    assert failure(status("", failed, "no such route"), "app") == "no such route"
    assert failure(status("It failed to start: x", failed, "see d"), "app").endswith(": x")
    assert failure(status("", failed), "app")


def test_the_reason_is_the_last_exception(tmp_path):
    message = "A replica failed to start.\nTraceback ...\n  File x\nValueError: too long: 9 > 8\n"
    assert reason(message, tmp_path) == "ValueError: too long: 9 > 8"
    assert reason("no reason\n here", tmp_path) == "no reason here"


def test_the_reason_of_an_engine_process_is_in_its_log(tmp_path):
    message = "RuntimeError: Engine core initialization failed. See root cause above."
    assert "initialization failed" in reason(message, tmp_path)
    (tmp_path / "worker-1.err").write_text(
        "(EngineCore pid=7) ERROR ValueError: No memory for the cache\n"
        "(EngineCore pid=7) RuntimeError: EngineCore failed to start.\n"
        "ValueError: of somebody else\n"
    )
    assert reason(message, tmp_path) == "ValueError: No memory for the cache"


# --- paths of sockets ----------------------------------------------------------------------------


def test_a_long_temporary_path_is_left_for_a_short_one(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", None)
    assert temporary.short_folder(90) in (temporary.Path("/tmp"), temporary.Path("/dev/shm"))
    temporary.leave_room_for_sockets()
    assert temporary.os.environ["TMPDIR"] in ("/tmp", "/dev/shm")
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(temporary, "_OTHERS", ())
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(SereError, match=r"TMPDIR = .*short path"):
        temporary.leave_room_for_sockets()


def test_a_short_temporary_path_stays(monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    temporary.leave_room_for_sockets()
    assert temporary.os.environ["TMPDIR"] == "/dev/shm"


# --- the way -------------------------------------------------------------------------------------


def test_the_environment_is_as_it_was(monkeypatch):
    monkeypatch.delenv(way.SWITCHES[0], raising=False)
    before = dict(way.os.environ)
    with way.switched(way.DIRECT), way.prepared(way.DIRECT, way.Limits(header_s=3)):
        assert way.os.environ[way.SWITCHES[0]] == "1"
        assert way.Limits.of_environment().header_s == 3
        program = way.os.environ[way.BINARY_VARIABLE]
        assert way.os.access(program, way.os.X_OK)
    assert dict(way.os.environ) == before
    assert not way.Path(program).exists()


def test_the_direct_way_is_taken_where_haproxy_is(monkeypatch):
    assert way.choose(None) == way.DIRECT
    assert way.choose("default") == way.DEFAULT
    monkeypatch.setattr(way.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(way.shutil, "which", lambda name: None)
    assert way.choose(None) == way.DEFAULT
    with pytest.raises(SereError, match="--proxy direct: HAProxy is not installed"):
        way.choose("direct")
