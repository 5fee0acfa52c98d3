"""Levels of masks, one after the other, as each worker trains them; a lone one tells nobody."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sere_ray.artifact.gates import router_fingerprint
from sere_ray.masks.edit import STEPS_SHARE, Edit
from sere_ray.masks.exchange import Exchange
from sere_ray.masks.frozen_model import FrozenModel, Validation
from sere_ray.masks.listener import Listener
from sere_ray.masks.plan import TrainPlan
from sere_ray.masks.schedule import Units
from sere_ray.masks.work_folder import State, WorkFolder

VALIDATIONS = 4
"""Of a level, evenly spaced; the last one is at its end."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What Adam keeps of a router, by its names."""


class Training:
    """What a worker does. All of them hold the same state, and the first one saves it.

    Args:
        plan: what is trained on what.
        model: this worker's copy; frozen here.
        state: where training stands; changed as it goes.
        work: where it is saved.
        exchange: with the other workers.
        listener: of the first worker; None = nobody.
    """

    save_seconds = 10.0
    """Between two savings."""

    def __init__(
        self,
        plan: TrainPlan,
        model: PreTrainedModel,
        state: State,
        work: WorkFolder,
        exchange: Exchange,
        listener: Listener | None,
    ) -> None:
        self.plan, self.settings, self.state, self.work = plan, plan.settings, state, work
        self.exchange, self.listener = exchange, listener
        self.model = FrozenModel(model, plan.settings)
        self.state.fingerprints = {
            i: router_fingerprint(layer.gate_weight) for i, layer in self.model.layers.items()
        }
        self.left_out = 0
        """How often, over layers and workers, EDiT left a pseudo-gradient out."""
        self.edit: Edit | None = None
        self.saved, self.sent_before = time.monotonic(), state.sent - exchange.sent
        self._begin_level()
        self._restore()

    def run(self) -> None:
        """Train what is left."""
        while self.state.level < len(self.settings.knobs):
            self._tell()
            while self.units.done < self.units.total:
                before = self.units.done
                together = self.state.step < self.settings.steps_together
                save = self._step_together() if together else self._steps_alone()
                self._tell()
                if self._validation_is_due(before):
                    self._settle()
                    self._validate()
                if save:
                    self._save_step(together)
            self._end_level()
        self._tell()

    def train_on(self, unit: int, rate: float) -> None:
        """Add the gradients of a unit of this level to the routers.

        Args:
            unit: of :mod:`sere_ray.masks.schedule`.
            rate: the learning rate of the step.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        self.model.add_gradients(self.windows_of(unit), self.settings.knobs[self.state.level])

    def windows_of(self, unit: int) -> Tensor:
        """``[windows, length]``: what a unit of this level is trained on."""
        return self.plan.windows_of_unit(self.state.level, unit)

    def _step_together(self) -> bool:
        """A step on the mean of all workers' gradients; whether to save."""
        self.train_on(self.units.of_worker(self.exchange.rank)[0], self._rate(0))
        if self.exchange.size > 1:
            self._average_gradients()
        self.optimizer.step()
        self._count([1] * self.exchange.size)
        return self._wants_to_save()

    def _steps_alone(self) -> bool:
        """Steps of this worker, until it is time to meet; whether to save. The meeting ends in the
        pass to come."""
        edit, settings = self._edit(), self.settings
        start, rates = time.monotonic(), list[float]()
        for unit in self.units.of_worker(self.exchange.rank):
            rates.append(self._rate(len(rates)))
            self.train_on(unit, rates[-1])
            self.optimizer.step()
            timed = settings.sync == "a-edit"
            if timed and time.monotonic() - start >= settings.sync_seconds:
                break
            if not timed and len(rates) == settings.sync_every:
                break
        edit.settle_all()  # a worker that had nothing to do
        met = edit.meet(len(rates), sum(rates), self._wants_to_save())
        if met.broken:
            self.optimizer.state.clear()
        self.left_out += met.left_out
        self._count(met.steps)
        return met.save

    def _average_gradients(self) -> None:
        """One message for all layers."""
        routers = list(self.model.routers.values())
        gradients = [router.grad for router in routers if router.grad is not None]
        assert len(gradients) == len(routers)
        flat = torch.cat([gradient.flatten() for gradient in gradients]).cpu()
        mean = self.exchange.sum(flat) / self.exchange.size
        parts = torch.split(mean, [router.numel() for router in routers])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def _edit(self) -> Edit:
        """Of this level, from the moment on when workers step alone."""
        if self.edit is None:
            share = STEPS_SHARE if self.settings.sync == "a-edit" else 0.0
            self.edit = Edit(self.model.routers, self.exchange, share)
            self.model.before_layer = self.edit.settle
        return self.edit

    def _settle(self) -> None:
        if self.edit is not None:
            self.edit.settle_all()

    def _rate(self, steps: int) -> float:
        """The learning rate, falling to 0 over a level, so many steps after the last meeting."""
        units = self.units
        done = min(units.done + steps * units.workers, units.total - units.workers)
        return self.settings.learning_rate * (1 - done / units.total)

    def _count(self, steps: list[int]) -> None:
        self.units.take(steps)
        self.state.step, self.state.ahead = self.units.whole, self.units.ahead

    def _begin_level(self) -> None:
        state, settings = self.state, self.settings
        self.units = Units(settings.steps, settings.workers, state.step, state.ahead)
        self.optimizer = torch.optim.Adam(self.model.routers.values(), lr=settings.learning_rate)
        self.edit = None
        self.model.before_layer = lambda layer: None

    def _end_level(self) -> None:
        state = self.state
        self._settle()
        for index, weight in self.model.copy_of_routers().items():
            state.tensors[f"done.{state.level}.{index}"] = weight
        state.level, state.step, state.ahead = state.level + 1, 0, []
        self._begin_level()
        self._save({})

    def _validation_is_due(self, before: int) -> bool:
        """Whether a validation comes now, where so many units were done the last time."""
        steps, workers = self.settings.steps, self.settings.workers
        every = max(1, steps // VALIDATIONS)
        now = self.units.done // workers
        left = steps - now
        return left == 0 or (now // every > before // workers // every and left >= every)

    def _validate(self) -> None:
        """Take down, and tell, what the masks give now; each worker tries them on a part."""
        found = self._validation()
        self.state.history.append(self._row(found))
        if self.listener is not None:
            kept = " ".join(f"{share:.0%}" for share in found.slots_kept.values())
            self.listener.say(
                f"level {self.state.level + 1}, step {self.state.history[-1]['step']}: KL "
                f"{found.kl_mean:.4f}, slots kept {found.slots_mean:.0%}, experts of a batch "
                f"{found.experts_mean:.0%}; slots by layer {kept}"
            )

    def _validation(self) -> Validation:
        """Of all windows: the mean over their batches."""
        windows, exchange = self.plan.validation, self.exchange
        if exchange.size == 1:
            return self.model.validate(windows)
        batches = torch.split(windows, self.settings.batch)
        own = batches[exchange.rank :: exchange.size]
        layers = list(self.model.layers)
        sums = torch.zeros(1 + 2 * len(layers), dtype=torch.float64)
        if own:
            found = self.model.validate(torch.cat(own))
            means = [found.kl_mean, *found.slots_kept.values(), *found.experts_kept.values()]
            sums += len(own) * torch.tensor(means, dtype=torch.float64)
        kl, *kept = (exchange.sum(sums) / len(batches)).tolist()
        slots, experts = kept[: len(layers)], kept[len(layers) :]
        by_layer = (dict(zip(layers, shares, strict=True)) for shares in (slots, experts))
        return Validation(kl, *by_layer)

    def _row(self, found: Validation) -> dict[str, Any]:
        settings, state, units = self.settings, self.state, self.units
        return {
            "level": state.level + 1,
            "knob": settings.knobs[state.level],
            "step": units.done // units.workers,
            "tokens": units.done * settings.share * settings.length,
            "bytes_sent": self._sent(),
            "kl_mean": round(found.kl_mean, 6),
            "slots_kept": round(found.slots_mean, 5),
            "experts_kept": round(found.experts_mean, 5),
            "slots_kept_by_layer": [round(share, 4) for share in found.slots_kept.values()],
            "experts_kept_by_layer": [round(share, 4) for share in found.experts_kept.values()],
        }

    def _tell(self) -> None:
        if self.listener is not None:
            done = self.units.done // self.units.workers
            self.listener.at(self.state.level * self.settings.steps + done)

    def _sent(self) -> int:
        return self.sent_before + self.exchange.sent

    def _wants_to_save(self) -> bool:
        return self.exchange.rank == 0 and time.monotonic() - self.saved > self.save_seconds

    def _save_step(self, together: bool) -> None:
        """Save within a level. Where workers step alone each has moments of its own."""
        moments = self._moments()
        if not together:
            self._settle()
            moments = {name: self.exchange.gather(own[0]) for name, own in moments.items()}
            moments |= self._edit().tensors()
        self._save(moments)

    def _save(self, tensors: dict[str, Tensor]) -> None:
        """Write routers and what else goes with them beside what is done, if this is the first
        worker: the others hold the same."""
        if self.exchange.rank:
            return
        state = self.state
        done = {name: t for name, t in state.tensors.items() if name.startswith("done.")}
        now = {f"now.{i}": weight for i, weight in self.model.copy_of_routers().items()}
        state.tensors, state.sent = done | now | tensors, self._sent()
        self.work.save(state)
        self.saved = time.monotonic()

    def _moments(self) -> dict[str, Tensor]:
        """``[1, ...]``: what Adam keeps of each router, by name and layer; 0 before any step."""
        found = {}
        for index, router in self.model.routers.items():
            of_router = self.optimizer.state.get(router, {})
            for name in _MOMENTS:
                empty = torch.zeros(() if name == "step" else router.shape)
                found[f"{name}.{index}"] = of_router.get(name, empty).cpu()[None]
        return found

    def _restore(self) -> None:
        """Go on from the state, if it is not a new one."""
        tensors = self.state.tensors
        if not tensors:
            return
        self.model.set_routers({i: tensors[f"now.{i}"] for i in self.model.layers})
        for index, router in self.model.routers.items():
            if f"step.{index}" not in tensors:  # the level begins
                return
            for name in _MOMENTS:
                of_workers = tensors[f"{name}.{index}"]
                own = of_workers[self.exchange.rank % len(of_workers)].clone()
                device = "cpu" if name == "step" else router.device
                self.optimizer.state[router][name] = own.to(device)
        if any(name.startswith("norms.") for name in tensors):
            self._edit().restore(tensors)
