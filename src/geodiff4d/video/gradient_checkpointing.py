"""Gradient checkpointing: activations of a module are thrown away after the forward pass and made again for the
backward pass. What remains in memory is one tensor between modules."""

from functools import partial

from torch.utils.checkpoint import checkpoint

from geodiff4d.video.attention import ExpressionAttention, Transformer2D
from geodiff4d.video.model import VideoModel
from geodiff4d.video.temporal import TemporalModule
from geodiff4d.video.unet import Resnet

CHECKPOINTED = (Resnet, Transformer2D, ExpressionAttention, TemporalModule)


def checkpoint_gradients(model: VideoModel) -> None:
    """Let every layer of both networks recompute its activations; results and gradients stay what they are."""
    for network in (model.unet, model.reference):
        for module in network.modules():
            if isinstance(module, CHECKPOINTED):
                # On the instance: parameters keep their names, and nothing changes in a saved model.
                module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
