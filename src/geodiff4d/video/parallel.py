"""How processes train one model together: with copies of everything (DDP), or with shares of it (ZeRO, stage 2).

Both take the same steps, but for the order of sums, and leave the same checkpoints, so that a run goes on with either.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from geodiff4d.core.rundir import optimiser_tensors, restore_optimiser
from geodiff4d.video.model import VideoModel
from geodiff4d.video.objective import Objective, averaged, trained_state

Named = Iterable[tuple[str, Tensor]]
Groups = Sequence[tuple[float, Sequence[str]]]
"""Factor on the rate, and the names of the weights that have it."""


@runtime_checkable
class Parallel(Protocol):
    """One process's part in a training."""

    optimiser: AdamW

    @property
    def objective(self) -> nn.Module:
        """What turns a batch into losses."""
        ...

    def begin(self) -> None:
        """Exchange gradients from now on."""
        ...

    def owns(self, name: str) -> bool:
        """Say whether this process keeps a weight's average and moments."""
        ...

    def part(self, last: bool) -> AbstractContextManager[object]:
        """Enclose forward and backward pass of a part of a step; gradients are exchanged in the last one at least."""
        ...

    def clip(self, most: float) -> Tensor:
        """Scale the gradients so that their norm, over all processes, is at most so much; return what it was."""
        ...

    def step(self) -> None:
        """Change the weights, everywhere, and forget the gradients."""
        ...

    def checkpoint(self, ema: dict[str, Tensor]) -> Named:
        """Yield what to go on from, all of it in the first process; every process must go through it."""
        ...

    def restore(self, ema: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        """Take a checkpoint over."""
        ...

    def averaged(self, ema: dict[str, Tensor]) -> AbstractContextManager[object]:
        """Lend the average to the first process's model within the block; every process must enter it."""
        ...

    def take(self, ema: dict[str, Tensor]) -> None:
        """Give the first process's model the average for good; every process must call it."""
        ...


def adamw(model: VideoModel, groups: Groups, lr: float, beta2: float, weight_decay: float) -> AdamW:
    """Return the optimiser of some weights; the factor of every group is kept in it."""
    known = dict(model.named_parameters())
    made: list[dict[str, Any]] = [{"params": [known[n] for n in names], "factor": f} for f, names in groups if names]
    return AdamW(made, lr, (0.9, beta2), weight_decay=weight_decay, fused=True)


class Replicated:
    """Copies of everything in every process, whose gradients are averaged (DDP); also one process alone."""

    def __init__(self, accelerator: Any, model: VideoModel, groups: Groups, temporal_loss: float, *options: float):
        """`options` are those of `adamw`."""
        self.accelerator, self.model = accelerator, model
        self.objective, self.optimiser = Objective(model, temporal_loss), adamw(model, groups, *options)

    def begin(self) -> None:
        self.objective, self._prepared = self.accelerator.prepare(self.objective, self.optimiser)

    def owns(self, name: str) -> bool:
        return True

    def part(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self.accelerator.no_sync(self.objective)

    def clip(self, most: float) -> Tensor:
        return self.accelerator.clip_grad_norm_(self.objective.parameters(), most)

    def step(self) -> None:
        self._prepared.step()
        self._prepared.zero_grad(set_to_none=True)

    def checkpoint(self, ema: dict[str, Tensor]) -> Named:
        if self.accelerator.is_main_process:
            yield from ((f"model.{k}", v) for k, v in trained_state(self.model).items())
            yield from ((f"ema.{k}", v) for k, v in ema.items())
            yield from optimiser_tensors(self.optimiser).items()

    def restore(self, ema: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        restore_model(self.model, ema, tensors)
        restore_optimiser(self.optimiser, tensors)

    def averaged(self, ema: dict[str, Tensor]) -> AbstractContextManager[object]:
        return averaged(self.model, ema) if self.accelerator.is_main_process else nullcontext()

    def take(self, ema: dict[str, Tensor]) -> None:
        self.model.load_state_dict(ema, strict=False)


def restore_model(model: VideoModel, ema: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Take weights and their average over from a checkpoint."""
    own = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(own, strict=False)
    for k, v in ema.items():
        v.copy_(tensors[f"ema.{k}"])


BUCKET = 8_000_000
"""Numbers that are sent at once."""
IN_FLIGHT = 2
"""Buckets under way, beside the one that is being filled."""


def shared_out(costs: Mapping[str, int], processes: int) -> dict[str, int]:
    """Return the process that owns each weight: the most expensive first, each to the process that has least."""
    owner, load = dict[str, int](), [0] * processes
    for name in sorted(costs, key=lambda n: (-costs[n], n)):
        owner[name] = min(range(processes), key=load.__getitem__)
        load[owner[name]] += costs[name]
    return owner


class Sharded:
    """Whole weights in every process, and of gradients, AdamW's moments and the average a share (ZeRO, stage 2:
    Rajbhandari et al. 2020).

    Every weight belongs to one process. As soon as the backward pass has its gradient, it is summed up in its owner and
    forgotten elsewhere; its owner steps, and tells the others. The model knows nothing of it: it may be validated and
    sampled as any other.
    """

    def __init__(self, accelerator: Any, model: VideoModel, groups: Groups, temporal_loss: float, *options: float):
        """`options` are those of `adamw`."""
        self.model, self.objective = model, Objective(model, temporal_loss)
        self.rank, self.ranks = accelerator.process_index, accelerator.num_processes
        self._order = [name for _, names in groups for name in names]
        self._trained = {k: p for k, p in model.named_parameters() if k in set(self._order)}
        # A gradient, two moments and an average; what is not trained has only the last.
        costs = {k: v.numel() * (4 if k in self._trained else 1) for k, v in trained_state(model).items()}
        self.owner = shared_out(costs, self.ranks)
        self.optimiser = adamw(model, [(f, [n for n in names if self.owns(n)]) for f, names in groups], *options)
        self._filling: list[list[tuple[str, Tensor]]] = [[] for _ in range(self.ranks)]
        self._flying: deque[tuple[Any, Tensor, list[tuple[str, nn.Parameter]]]] = deque()
        self._gradients: dict[str, Tensor] = {}
        self._buckets = self._in_buckets()

    def begin(self) -> None:
        for name, parameter in self._trained.items():
            parameter.register_post_accumulate_grad_hook(partial(self._ready, name))

    def owns(self, name: str) -> bool:
        return self.owner[name] == self.rank

    @contextmanager
    def part(self, last: bool) -> Iterator[None]:
        yield
        for owner in range(self.ranks):
            self._send(owner)
        while self._flying:
            self._arrive()

    def _ready(self, name: str, parameter: Tensor) -> None:
        """Take a gradient that is complete from its weight. The backward pass has the same order in every process."""
        assert parameter.grad is not None
        waiting = self._filling[self.owner[name]]
        waiting.append((name, parameter.grad))
        parameter.grad = None
        if sum(g.numel() for _, g in waiting) >= BUCKET:
            self._send(self.owner[name])

    def _send(self, owner: int) -> None:
        waiting, self._filling[owner] = self._filling[owner], []
        if not waiting:
            return
        flat = torch.cat([g.flatten() for _, g in waiting]).div_(self.ranks)
        # Elsewhere only names are kept: gradients are let go.
        kept = [(n, self._trained[n]) for n, _ in waiting] if owner == self.rank else []
        self._flying.append((torch.distributed.reduce(flat, owner, async_op=True), flat, kept))
        while len(self._flying) > IN_FLIGHT:
            self._arrive()

    def _arrive(self) -> None:
        work, flat, kept = self._flying.popleft()
        work.wait()
        for (name, parameter), piece in (
            zip(kept, flat.split([p.numel() for _, p in kept]), strict=True) if kept else ()
        ):
            if name in self._gradients:
                self._gradients[name] += piece.view(parameter.shape)
            else:
                # It lies in memory as its weight does, which fused kernels need.
                self._gradients[name] = torch.empty_like(parameter.detach()).copy_(piece.view(parameter.shape))

    @torch.no_grad()
    def clip(self, most: float) -> Tensor:
        own = list(self._gradients.values())
        device = next(iter(self._trained.values())).device
        squares = torch.stack(torch._foreach_norm(own)).square().sum() if own else torch.zeros((), device=device)
        torch.distributed.all_reduce(squares)
        norm = squares.sqrt()
        if own and math.isfinite(most):
            torch._foreach_mul_(own, (most / (norm + 1e-6)).clamp(max=1))
        return norm

    @torch.no_grad()
    def step(self) -> None:
        for name, gradient in self._gradients.items():
            self._trained[name].grad = gradient
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._gradients.clear()
        under_way: deque[tuple[Any, Tensor, list[nn.Parameter]]] = deque()
        for number, (owner, bucket) in enumerate(self._buckets, 1):
            weights = [self._trained[n] for n in bucket]
            flat = torch.cat([w.flatten() for w in weights])
            under_way.append((torch.distributed.broadcast(flat, owner, async_op=True), flat, weights))
            while under_way and (len(under_way) > IN_FLIGHT or number == len(self._buckets)):
                work, flat, weights = under_way.popleft()
                work.wait()
                for weight, piece in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
                    weight.copy_(piece.view(weight.shape))

    def _in_buckets(self) -> list[tuple[int, list[str]]]:
        """Trained weights by owner, some at a time."""
        found: list[tuple[int, list[str]]] = []
        for owner, names in groupby(sorted(self._trained, key=lambda n: self.owner[n]), lambda n: self.owner[n]):
            size = BUCKET
            for name in names:
                if size >= BUCKET:
                    found.append((owner, []))
                    size = 0
                found[-1][1].append(name)
                size += self._trained[name].numel()
        return found

    def _collected(self, own: Mapping[str, Tensor], owner: Mapping[str, int]) -> Named:
        """Yield tensors that are shared out, in the first process; `owner` says where each of them is."""
        like = {k: (tuple(v.shape), v.dtype) for k, v in own.items()}
        everyone: list[Any] = [None] * self.ranks
        torch.distributed.all_gather_object(everyone, like)
        device = self.model.device
        for name, (shape, kind) in {k: v for told in everyone for k, v in told.items()}.items():
            where = owner[name]
            if where == self.rank == 0:
                yield name, own[name]
            elif where == self.rank:
                torch.distributed.send(own[name].to(device).contiguous(), 0)
            elif self.rank == 0:
                received = torch.empty(shape, dtype=kind, device=device)
                torch.distributed.recv(received, where)
                yield name, received

    def checkpoint(self, ema: dict[str, Tensor]) -> Named:
        if self.rank == 0:
            yield from ((f"model.{k}", v) for k, v in trained_state(self.model).items())
        yield from self._collected(
            {f"ema.{k}": v for k, v in ema.items()}, {f"ema.{k}": r for k, r in self.owner.items()}
        )
        place = self._places()
        own, kinds = dict[str, Tensor](), ("exp_avg", "exp_avg_sq", "step")
        for name, value in optimiser_tensors(self.optimiser).items():
            _, index, key = name.split(".", 2)
            own[f"optimiser.{place[int(index)]}.{key}"] = value
        owner = {f"optimiser.{i}.{key}": self.owner[n] for i, n in enumerate(self._order) for key in kinds}
        yield from self._collected(own, owner)

    def _places(self) -> list[int]:
        """Return the places of the own weights among all that are trained, in the optimiser's order."""
        return [i for i, name in enumerate(self._order) if self.owns(name)]

    def restore(self, ema: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        restore_model(self.model, ema, tensors)
        own = {str(whole): i for i, whole in enumerate(self._places())}
        found: dict[str, Tensor] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            index, _, key = rest.partition(".")
            if kind == "optimiser" and index in own:
                found[f"optimiser.{own[index]}.{key}"] = value
        restore_optimiser(self.optimiser, found)

    @contextmanager
    def averaged(self, ema: dict[str, Tensor]) -> Iterator[None]:
        current = {}
        if self.rank == 0:
            # In the host's memory: the GPU may have no place for a second model.
            current = {k: v.detach().to("cpu", copy=True) for k, v in trained_state(self.model).items()}
        self.take(ema)
        self.model.eval()
        try:
            yield
        finally:
            self.model.load_state_dict(current, strict=False)
            self.model.train()

    @torch.no_grad()
    def take(self, ema: dict[str, Tensor]) -> None:
        state = trained_state(self.model)
        for name, value in self._collected(ema, self.owner):
            state[name].copy_(value)
