"""What the policy actor owns: versions of the policy, artifact, mode ``auto``, audit log.

All of it changes and is saved here, by plain calls. ``actor.py`` tells the replicas.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sere_ray.artifact.similarity import ArtifactMetadata
from sere_ray.masks.artifact import MasksMetadata
from sere_ray.masks.served import check_beside, check_level, layers_of
from sere_ray.policy.capabilities import (
    ANY_GATES,
    EngineKind,
    GateFacts,
    check_artifact,
    check_change,
    check_gates,
    check_swap,
    check_tables,
)
from sere_ray.policy.key import check_beside_start
from sere_ray.policy.policy import Policy
from sere_ray.policy.startup import Startup
from sere_ray.serve.policy_actor.artifacts import ArtifactFile, path_in, read_artifact
from sere_ray.serve.policy_actor.auto import AutoPilot
from sere_ray.serve.policy_actor.auto_config import AUTO, AutoConfig
from sere_ray.serve.policy_actor.store import Store
from sere_ray.serve.policy_actor.versions import AuditLog, Versions, first_version
from sere_ray.util.errors import SereError


class Holdings:
    """Loaded from the store, or begun with a deployment file. Every change is saved at once.

    Args:
        policy: keys of the deployment file's policy; files are named by paths on this node.
        folder: holds the artifacts that may be swapped in; None allows none.
        max_artifact_bytes: size limit of an artifact.
        engines: kind of the engines that run the policy.
        startup: what they are started with and keep.
        auto: target and levels; None allows no mode ``auto``.
        starts_auto: begin in mode ``auto``.
        store: where all this survives the actor.
        put: makes an object reference of bytes, as ``ray.put`` does.

    Raises:
        SereError: a file cannot be read, or the policy does not fit its model.
    """

    def __init__(
        self,
        policy: Mapping[str, Any],
        *,
        folder: Path | None,
        max_artifact_bytes: int,
        engines: EngineKind,
        startup: Startup,
        auto: AutoConfig | None,
        starts_auto: bool,
        store: Store,
        put: Callable[[bytes], Any],
    ) -> None:
        self._folder, self._max_bytes = folder, max_artifact_bytes
        self._engines, self._startup = engines, startup
        self._auto, self._store = auto, store
        self._saved, self._gates = True, ANY_GATES
        self.pilot: AutoPilot | None = None  # there is one in mode auto
        state = store.load()
        if state is None:
            self._file = _read(policy, "similarity", max_artifact_bytes)
            self._masks_file = _read(policy, "masks", max_artifact_bytes)
            sha256 = "" if self._file is None else self._file.sha256
            kept = [first_version(Policy.parse(dict(policy)), sha256)]
        else:
            kept = state["versions"]
            self._file = _kept(store, state["name"], kept[-1]["sha256"])
            self._masks_file = _kept(store, *(state.get("masks") or (None, "")))
            self._gates = state.get("gates", ANY_GATES)
        self.audit = AuditLog([] if state is None else state["audit"])
        of_masks = "" if self._masks_file is None else self._masks_file.sha256
        self.versions = Versions(kept, load=self._content, put=put, masks=of_masks)
        who, what = ("deployment file", "start") if state is None else ("router", "restart")
        self.audit.record(what, who, self.newest)
        self._artifact = None if self._file is None else self._file.parse()
        self._masks = None if self._masks_file is None else self._masks_file.parse_masks()
        base = Policy.parse(self.newest["policy"])
        check_beside_start(base, startup)
        check_artifact(base, self._artifact)
        check_level(base.level, self._masks, path=base.masks)
        check_beside(self._masks, self._artifact, path=base.masks)
        if state is None:
            pilot = None if auto is None else self._new_pilot(base)  # checks the levels, too
            self.pilot = pilot if starts_auto else None
            self._save(self._file, self._masks_file)
        elif state.get("auto") is not None:
            self._resume(Policy.parse({**state["auto"], "similarity": self._name}))

    @property
    def newest(self) -> dict[str, Any]:
        """The newest version."""
        return self.versions.newest

    @property
    def mode(self) -> str:
        """Mode of the newest policy, or ``auto``."""
        return AUTO if self.pilot is not None else str(self.newest["policy"]["mode"])

    def artifact(self) -> dict[str, Any]:
        """Name, hash and origin of the running artifact, and of the masks beside it.

        All but empty where the policy names no file.
        """
        file, artifact, masks = self._file, self._artifact, self._masks_file
        strengths = {} if artifact is None else artifact.metadata.strengths
        origin = self._origin
        return {
            "name": self._name,
            "sha256": self.newest["sha256"],
            "bytes": 0 if file is None else len(file.content),
            "layers": layers_of(artifact, self._masks),
            "metadata": origin.model_dump(exclude={"strengths", "levels"}) if origin else {},
            "losses": {rule: of.range for rule, of in strengths.items()},
            "masks": None if masks is None else masks.describe(self._masks),
        }

    def change_policy(self, changes: Mapping[str, Any], who: str) -> dict[str, Any]:
        """A new version with some keys changed.

        Raises:
            SereError: the policy is not valid; nothing has changed.
        """
        newest = self.newest
        try:
            policy = self._changed(changes)
        except SereError as error:
            self.audit.refuse("policy", who, str(error))
            raise
        version = self.versions.add(policy, newest["sha256"])
        self.audit.record("policy", who, version, before=newest["policy"], mode=self.mode)
        self._save()
        return version

    def change_artifact(self, name: str, who: str) -> dict[str, Any]:
        """A new version with another file of the configured folder.

        Raises:
            SereError: no such file, too large, damaged, of other weights, or less than the rule
                reads, or these engines keep the artifact they were started with; nothing changed.
        """
        newest = self.newest
        try:
            new = read_artifact(path_in(self._folder, name), self._max_bytes)
            check_swap(name, self._name, **self._engines)
            artifact = new.parse()
            if self._artifact is not None:
                artifact.check_replaces(self._artifact, path=name)
                check_tables(artifact, self._artifact, on_gpu=self._engines["on_gpu"])
            check_artifact(Policy.parse({**newest["policy"], "similarity": name}), artifact)
        except SereError as error:
            self.audit.refuse("artifact", who, str(error))
            raise
        policy = Policy.parse({**newest["policy"], "similarity": new.name})
        self._file, self._artifact = new, artifact
        if self.pilot is not None:
            self.pilot.rebase(self.pilot.base.model_copy(update={"similarity": new.name}))
        version = self.versions.add(policy, new.sha256)
        self.audit.record("artifact", who, version, before={"sha256": newest["sha256"]})
        self._save(new)
        return version

    def note_gates(self, gates: GateFacts) -> None:
        """Refuse from now on what these gates keep the engines from, as an engine tells them."""
        if gates != self._gates:
            self._gates = gates
            self._save()

    def follow_pilot(self, **why: Any) -> dict[str, Any]:
        """A new version with the policy of the level that mode ``auto`` has chosen."""
        assert self.pilot is not None
        version = self.versions.add(self.pilot.policy, self.newest["sha256"])
        self.audit.record("policy", AUTO, version, mode=AUTO, **why)
        self._save()
        return version

    def forget(self) -> None:
        """The deployment ends: the same file, deployed again, starts with its own policy."""
        self._store.forget()
        self._saved = False

    def save_again(self) -> None:
        """Save what :meth:`forget` dropped, if it did: a replica follows after all."""
        if not self._saved:
            self._save()

    # --- inside --------------------------------------------------------------------------------

    def _changed(self, changes: Mapping[str, Any]) -> Policy:
        """The policy after a change of keys. Begins, keeps or ends mode ``auto`` as they ask.

        Raises:
            SereError: it is not valid; nothing has changed.
        """
        newest, pilot = self.newest["policy"], self.pilot
        for key, how in _FILES.items():
            if changes.get(key, newest.get(key)) != newest.get(key):
                raise SereError(f"policy.{key} = {changes[key]!r}: {how}; leave the key out")
        mode = changes.get("mode", self.mode)
        base = Policy.parse(newest) if pilot is None else pilot.base
        written = {**changes, **{key: newest.get(key) for key in _FILES}}
        if mode == AUTO:
            written["mode"] = "off"
        policy = base.changed(written, where="policy")
        policy.check_layers(len(layers_of(self._artifact, self._masks)), where="policy")
        check_beside_start(policy, self._startup, where="policy")
        check_change(policy, Policy.parse(newest), **self._engines, where="policy")
        check_artifact(policy, self._artifact, where="policy")
        check_level(policy.level, self._masks, path=policy.masks)
        check_gates(policy, self._gates, where="policy")
        if mode != AUTO:
            self.pilot = None
            return policy
        if pilot is None:
            pilot = self._new_pilot(policy)
        pilot.rebase(policy)
        self.pilot = pilot
        return pilot.policy

    def _new_pilot(self, base: Policy) -> AutoPilot:
        if self._auto is None:
            raise SereError(
                "policy.mode = 'auto': this deployment has no levels; give `auto` in its file"
            )
        assert self._origin is not None, "a deployment file with `auto` names a file"
        return AutoPilot(base, self._auto, self._origin.top_k)

    def _resume(self, base: Policy) -> None:
        """Go on in mode ``auto`` after a restart, from exact routing."""
        self.pilot = self._new_pilot(base)
        self.follow_pilot(level=0, reason="the policy actor restarted")

    @property
    def _origin(self) -> ArtifactMetadata | MasksMetadata | None:
        """Of the artifact; where a policy names none, of its masks; None = it names no file."""
        known = self._masks if self._artifact is None else self._artifact
        return None if known is None else known.metadata

    @property
    def _name(self) -> str | None:
        """Of the running artifact's file."""
        return None if self._file is None else self._file.name

    def _content(self, sha256: str) -> bytes:
        for file in (self._file, self._masks_file):
            if file is not None and file.sha256 == sha256:
                return file.content
        return self._store.load_blob(sha256)

    def _save(self, *new: ArtifactFile | None) -> None:
        for file in filter(None, new):
            self._store.save_blob(file.sha256, file.content)
        self._saved, masks = True, self._masks_file
        self._store.save(
            {
                "versions": self.versions.kept,
                "audit": self.audit.entries(),
                "name": self._name,
                "masks": masks and (masks.name, masks.sha256),
                "auto": None if self.pilot is None else self.pilot.base.model_dump(),
                "gates": self._gates,
            },
            blobs=self.versions.hashes,
        )


_FILES = {
    "similarity": "the artifact is changed with PUT /sere/artifact",
    "masks": "engines keep the masks they were started with, only `level` moves",
}
"""Keys of files, and why a change of the policy cannot have them."""


def _read(policy: Mapping[str, Any], key: str, max_bytes: int) -> ArtifactFile | None:
    """The file under a key of a policy; None = it names none."""
    path = policy.get(key)
    return None if path is None else read_artifact(Path(path).expanduser(), max_bytes)


def _kept(store: Store, name: str | None, sha256: str) -> ArtifactFile | None:
    """A file that an earlier actor has read."""
    return ArtifactFile(name, sha256, store.load_blob(sha256)) if name and sha256 else None
