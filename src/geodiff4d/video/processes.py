"""Processes that train one model together must start alike: what they start from is compared, not assumed."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geodiff4d.core.errors import UserError
from geodiff4d.core.fingerprint import fingerprint


@torch.no_grad()
def broadcast(accelerator: Any, module: nn.Module) -> None:
    """Give every process the first one's weights of a module."""
    if accelerator.num_processes == 1:
        return
    from torch import distributed

    for value in module.state_dict().values():
        sent = value.contiguous()  # Convolutions may lie channels-last, which backends refuse.
        distributed.broadcast(sent, 0)
        value.copy_(sent)


def check_consistent(accelerator: Any, known: dict[str, Any], model: nn.Module) -> None:
    """Compare what every process knows, and the first numbers of every weight.

    Args:
        accelerator: Accelerate's, which knows the processes.
        known: what must be the same everywhere, by what to call it.

    Raises:
        UserError: the processes differ; every one of them raises, so that none waits for the others.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    told = {name: fingerprint(value) for name, value in known.items()}
    told["torch"] = torch.__version__
    heads = [p.detach().flatten()[:16].float().cpu() for p in model.parameters()]
    told["weights to start from"] = fingerprint(torch.cat(heads))
    everyone = gather_object([told])
    differing = [name for name in told if len({other[name] for other in everyone}) > 1]
    if differing:
        raise UserError(
            f"the {accelerator.num_processes} processes disagree about their {' and their '.join(differing)}: give all "
            "hosts the same command, the same version and one --out on a file system they share"
        )


class Exchange:
    """What processes tell each other in every step: losses, whether one was asked to stop, and whether one's last
    checkpoint is old."""

    def __init__(self, processes: int):
        self.processes = processes
        self._asked: Tensor | None = None

    def __call__(self, losses: Float[Tensor, " d"], asked: bool, old: bool) -> tuple[Float[Tensor, " d"], bool, bool]:
        """Return the losses' mean over all processes, whether all are to stop after this step, and whether to save.

        Requests are answered one step later where there are several processes: by then the answer has long arrived,
        and no GPU is waited for.
        """
        if self.processes == 1:
            return losses, asked, old
        from torch import distributed

        told = torch.cat([losses, losses.new_tensor([asked, old])])
        distributed.all_reduce(told)
        stops, saves = (False, False) if self._asked is None else (x > 0 for x in self._asked.tolist())
        self._asked = told[-2:]
        if saves:  # Before this checkpoint, the last one was old.
            self._asked[1] = 0
        return told[:-2] / self.processes, stops, saves
