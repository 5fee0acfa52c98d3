"""Entry point ``vllm.general_plugins: sere``. vLLM calls it in every process, maybe twice."""


def register() -> None:
    """Let vLLM understand ``--additional-config '{"sere": {...}}'``; off unless the key is set."""
    from sere_ray.engine.patches import install_observers

    install_observers()
