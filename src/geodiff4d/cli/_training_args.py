"""The options of `geodiff4d train`, which its stages read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d train`."""

    stage: Annotated[
        Literal["all", "vae", "image", "video", "decoder", "perception", "reader", "person", "identity"],
        tyro.conf.Positional,
    ]
    """all: every network that ships, from nothing, by a recipe (it reads out, preset, recipe, dry-run, photographs,
    workers and seed of the options below). vae: the codec. image: stage 1 of the paper, the joint RGB + normal model
    without temporal modules. video: its second stage, temporal modules alone, from a stage-1 model. decoder: what
    finishes a model's frames, with the warped portrait. perception: what tracking looks with (landmarks, mask,
    normals). reader: what reads expression and gaze from close crops of faces. person: what tells people from their
    backgrounds. identity: the open measure of identity. decoder, perception, reader and person read preset, data,
    start, steps, workers and seed, all but perception photographs too; identity reads preset and seed."""
    out: Path
    """Run folder: config, log, curves, validation pictures, checkpoints, and the model to give to --model."""
    preset: Literal["debug", "embedded", "paper"] = "embedded"
    """debug: seconds. embedded: hours on two cores. paper: a GPU, and --sd."""
    recipe: Path | None = None
    """Of `all`: a recipe of your own (TOML) in place of the preset's, in `assets/recipes`."""
    dry_run: bool = False
    """Of `all`: print the stages with their hours, and what is left of them, and do nothing."""
    data: tuple[Path, ...] = ()
    """What to train on, by default OUT/data. One folder that is empty or holds rendered stores: the open world, which
    is rendered there if missing. Otherwise any mixture of imported data sets, folders of tracked clips, and stores;
    what lies in a folder `val` below one is validated on, and never trained on."""
    importance: tuple[float, ...] = ()
    """Importance per sample of each --data folder, then of the photographs; by default 10 for several views and 1 for
    one, photographs having a quarter of all samples."""
    head: Path | None = None
    """FLAME model file, for clips on FLAME."""
    sd: Path | None = None
    """Stable Diffusion 1.5 folder that preset paper starts from (its unet and vae)."""
    vae: Path | None = None
    """Codec folder for the image stage; by default the one that ships."""
    start: Path | None = None
    """Model folder whose weights to continue from (its optimiser starts afresh): by default the shipped one in the
    video stage and none in the others. Another patch codec's weights are carried over; paper
    then needs no --sd."""
    photographs: Path | None = None
    """Folder with photographs of faces. The reader stage learns to read them alike however they are cut and spoiled; of
    two named ID_neutral and ID_smiling, that the second smiles no less. For the image and decoder stages they are the
    truth for what a portrait hides (clips of `import portraits` too; what lies in a folder `val` below is held out).
    The person stage cuts people out and puts them before others' backgrounds; a tenth of the people is held out."""
    steps: int | None = None
    """Train so many steps instead of the preset's."""
    ablate: tuple[Literal["joint", "domain-attention", "cross-view", "synthetic", "warp"], ...] = ()
    """Switch parts off: joint (no normals), domain-attention, cross-view (drive by the target itself), synthetic (train
    on normals as an estimator gives them), warp."""
    parameters: Literal["disturbed", "tracked"] = "disturbed"
    """Of the open world's heads in the image stage: the truth with a tracker's error, or what our tracker sees in the
    rendered pictures, a quarter of a second each."""
    bf16: bool = True
    """Compute in bf16 where the machine has it."""
    accumulate: int = 1
    """Parts that a process takes a step's batch in, one after another: less memory, the same step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory for a third more time."""
    ema_on_host: bool = False
    """Keep the average of the weights in the host's memory: a fifth less on the GPU in stage 1."""
    zero: bool = False
    """Share gradients, optimiser and average out to the processes (ZeRO, stage 2): with four GPUs, half the memory."""
    parts: Literal["all", "temporal"] | None = None
    """What is trained: by default everything in the image stage, temporal modules alone in the video stage."""
    beta2: float | None = None
    """AdamW's second decay rate, by default the preset's, as are the next three."""
    ema: float | None = None
    """Decay of the averaged weights; 0 saves them as they are."""
    clip: float | None = None
    """Largest norm of a gradient; 0 clips none."""
    weight_decay: float | None = None
    """AdamW's weight decay."""
    save_minutes: float = 10.0
    """Also write a checkpoint when the last one is this old."""
    keep_checkpoints: int = 2
    """How many checkpoints stay, the newest among them."""
    workers: int = 2
    """Processes that render the stores, or decode other footage ahead (0: none)."""
    seed: int = 0
