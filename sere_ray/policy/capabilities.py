"""Which policies an engine can run, by device, number of data-parallel ranks and gates.

In one place for engines, which refuse what they cannot run, and for deployments, which must not
hand an engine what it would refuse: its gang would restart and refuse it again.
"""

from typing import TypedDict

from sere_ray.artifact.similarity import SimilarityArtifact
from sere_ray.policy.policy import Policy
from sere_ray.rules import RULES
from sere_ray.util.errors import PolicyError, UnsupportedError


class EngineKind(TypedDict):
    """What decides which policies engines can run: arguments of the checks below."""

    on_gpu: bool
    several_ranks: bool


class GateFacts(TypedDict):
    """What the gates of an engine's model keep policies from; only the engine sees them.

    Each names the first such layer, by decoder layer index; None = there is none.
    """

    unknown: tuple[int, str] | None
    """Ranks experts by what rules cannot read; with what that is."""
    odd: int | None
    """Has a bias, groups or other scores than a softmax."""
    hashed: int | None
    """Experts are chosen by a table of token ids."""


ANY_GATES = GateFacts(unknown=None, odd=None, hashed=None)
"""Of a model whose gates keep policies from nothing."""


def check_gates(policy: Policy, gates: GateFacts, *, where: str = "sere") -> None:
    """Refuse a rule that reads scores which a gate does not choose by, and masks beside gates that
    they were not shown right with.

    Args:
        policy: valid for the model.
        gates: of the model.
        where: name of the policy in error messages.

    Raises:
        UnsupportedError: names the layer and what its gate has.
    """
    reads_scores = RULES[policy.rule].needs_scores
    if policy.masks is not None and gates["hashed"] is not None:
        raise UnsupportedError(
            f"{where}.masks = {policy.masks!r}: a table of token ids chooses the experts of layer "
            f"{gates['hashed']}, beside which masks were never trained; leave masks out"
        )
    if policy.masks is not None and policy.level and reads_scores and gates["odd"] is not None:
        raise UnsupportedError(
            f"{where}.level = {policy.level} with rule = {policy.rule!r}: the gate of layer "
            f"{gates['odd']} has a bias, groups or other scores than a softmax, behind which masks "
            "go with none and sere only; use one of these, or level = 0"
        )
    if reads_scores and gates["unknown"] is not None:
        layer, what = gates["unknown"]
        raise UnsupportedError(
            f"{where}.rule = {policy.rule!r}: needs a gate that ranks experts by known scores; "
            f"that of layer {layer} has {what}; use rule = 'sere'"
        )


def check_policy(policy: Policy, *, on_gpu: bool, where: str = "sere") -> None:
    """Refuse a policy that engines of this kind cannot run.

    Args:
        policy: valid for the model.
        on_gpu: whether a rank computes on a GPU.
        where: name of the policy in error messages.

    Raises:
        UnsupportedError: names the key.
    """
    entries = [(f"by_rows.{i}.", dict(e.keys)) for i, e in enumerate(policy.by_rows or ())]
    for place, keys in [("", policy.model_dump()), *entries]:
        if on_gpu and keys.get("balance_ranks"):
            raise UnsupportedError(
                f"{where}.{place}balance_ranks = True: a CPU engine follows it; the CUDA kernel "
                "of it has run in the emulator alone, on no GPU yet: leave it out on a GPU"
            )


def check_artifact(
    policy: Policy, artifact: SimilarityArtifact | None, *, where: str = "sere"
) -> None:
    """Refuse a policy that reads more than the artifact says; without one it reads nothing of it.

    Raises:
        ArtifactError: names what it reads, and the command that adds it.
        PolicyError: a key does not fit the artifact's model.
    """
    if artifact is None:
        return
    strengths = artifact.metadata.strengths
    policy.for_model(top_k=artifact.metadata.top_k, strengths=strengths, where=where)
    names = RULES[policy.rule].statistics
    artifact.check_has(names, path=str(policy.similarity), rule=policy.rule)


def check_change(
    policy: Policy, running: Policy, *, on_gpu: bool, several_ranks: bool, where: str = "sere"
) -> None:
    """Refuse a policy that engines of this kind cannot run, or cannot change to while they run.

    Args:
        policy: the new one; valid for the model.
        running: the one that they run.
        on_gpu: whether a rank computes on a GPU.
        several_ranks: whether there is more than one data-parallel rank.
        where: name of the policy in error messages.

    Raises:
        UnsupportedError: engines of this kind cannot run it.
        PolicyError: these engines would have to restart for it.
    """
    check_policy(policy, on_gpu=on_gpu, where=where)
    if on_gpu and several_ranks:
        if policy.union != running.union:
            raise PolicyError(
                f"{where}.union = {policy.union!r}: captured graphs hold {running.union!r}; "
                "restart the engine to change it"
            )
        if policy.union == "global" and policy.rule != running.rule:
            raise PolicyError(
                f"{where}.rule = {policy.rule!r}: under union = 'global' captured graphs hold what "
                f"ranks exchange for {running.rule!r}; restart the engine to change it"
            )


def check_tables(new: SimilarityArtifact, running: SimilarityArtifact, *, on_gpu: bool) -> None:
    """Refuse an artifact for whose statistics a running engine has no room.

    Raises:
        PolicyError: says what to do.
    """
    names = RULES["spare"].statistics
    has, brings = (
        any(set(names) <= set(artifact.statistics.get(i, {})) for i in artifact.layers)
        for artifact in (running, new)
    )
    if on_gpu and brings and not has:
        raise PolicyError(
            f"sere.similarity: the new artifact has {', '.join(names)}, the running one has not, "
            "and engines on GPUs make room for them when they start; restart them with it"
        )


def check_swap(name: str, running: str | None, *, on_gpu: bool, several_ranks: bool) -> None:
    """Refuse another artifact where running engines keep theirs, or have none.

    Raises:
        PolicyError: names both files.
    """
    if running is None:
        raise PolicyError(
            f"sere.similarity = {name!r}: these engines were started without an artifact; restart "
            "them with it"
        )
    if on_gpu and several_ranks:
        raise PolicyError(
            f"sere.similarity = {name!r}: data-parallel engines on GPUs keep the artifact they "
            f"were started with ({running!r}); restart them"
        )
