"""Less memory than everything at once: what a stage does not need waits in the host's memory.

A clip has three stages that never overlap: encoding the portrait and the driver, denoising, decoding. At the paper's
size the networks of the other two weigh more than many cards have to spare.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from geodiff4d.video.model import VideoModel

PARTS = ("unet", "reference", "expression", "codec", "image_encoder", "decoder")


def parts(model: VideoModel) -> dict[str, nn.Module]:
    """Every network that a model has, by name."""
    found = {**model.networks(), "codec": model.codec, "image_encoder": model.image_encoder, "decoder": model.decoder}
    return {name: found[name] for name in PARTS if found[name] is not None}


@contextmanager
def alone(model: VideoModel, *names: str, offload: bool = True) -> Iterator[None]:
    """Leave only the named networks where the model is, and the others on the host, while the block runs.

    Names are those of `PARTS`; one that the model does not have is passed over. On a CPU nothing moves.

    Example:
        >>> with alone(model, "codec"):  # doctest: +SKIP
        ...     images = model.decode_latents(z)
    """
    assert set(names) <= set(PARTS), f"expected names of {PARTS}, got {names}"
    device = model.device
    if not offload or device.type == "cpu":
        yield
        return
    waiting = [network for name, network in parts(model).items() if name not in names]
    for network in waiting:
        network.to("cpu")
    try:
        yield
    finally:
        for network in waiting:
            network.to(device)
