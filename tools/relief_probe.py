"""How well what a portrait shows beside the head's mesh (hair, clothes) is carried to other views, against the truth.

Usage: `geodiff4d synth PEOPLE --subjects 10 --frames 1 --views 16 --size 256 --split val`, then
`.venv/bin/python tools/relief_probe.py PEOPLE`. Every fourth camera's image of a rendered person is lifted with its
true head and drawn in the person's other cameras. Of the pixels outside the mesh, above and below the shoulders, the
table has the share of the squared error that carrying explains: 1 is the truth, 0 is an empty background, and less than
0 worse than that.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from geodiff4d.core.camera import Camera
from geodiff4d.core.geometry import transform
from geodiff4d.data.clip import Clip
from geodiff4d.data.footage.clips import clips_below
from geodiff4d.heads.rig import Head, HeadParams
from geodiff4d.render.meshes import rasterize
from geodiff4d.render.relief import lift_portrait
from geodiff4d.render.torso import FADE_M, torso
from geodiff4d.render.viewpoints import openhead

FRONTAL_DEG = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("people", type=Path)
    folder = parser.parse_args().people
    errors: dict[tuple[str, str, int], list[Tensor]] = defaultdict(list)
    for clip in clips_below(folder):
        probe(Clip(clip), errors)
    print("| region | portrait | turned by | explained | images |\n|---|---|---|---|---|")
    for (region, portrait, turn), pairs in sorted(errors.items()):
        left, nothing = torch.stack(pairs).sum(0).tolist()
        print(f"| {region} | {portrait} | {turn}–{turn + 30}° | {1 - left / nothing:.3f} | {len(pairs)} |")


def probe(clip: Clip, errors: dict[tuple[str, str, int], list[Tensor]]) -> None:
    """Carry every fourth image of one instant to all others; adds (error, error of an empty background)."""
    head, frames = openhead(), [clip.frame(k) for k in range(len(clip))]
    cameras = Camera.stack([f.camera for f in frames])
    posed = head.pose(HeadParams.stack([f.params for f in frames if f.params is not None]))
    fragments = rasterize(posed.vertices, posed.faces, cameras)
    away = [azimuth_deg(f.camera) for f in frames]
    truth = torch.stack([f.image * f.mask + 0.5 * (1 - f.mask) for f in frames])
    below = torch.stack([under_shoulders(head, f.camera, T) for f, T in zip(frames, posed.T_world_joint, strict=True)])
    for a in range(0, len(frames), 4):
        mesh = head.pose(frames[a].params)
        lifted = lift_portrait(head, truth[a], frames[a].mask, mesh, frames[a].camera, cameras.width)
        rgb, visibility = lifted.shown(fragments, posed.T_world_joint, cameras)
        outside = 1 - visibility[:, 1:]
        for b in range(len(frames)):
            turn = int(abs(away[a] - away[b]) // 30) * 30
            for region, where in (("hair", 1 - below[b]), ("clothes", below[b])):
                counted = outside[b] * where
                pair = [((x - truth[b]).square() * counted).sum() for x in (rgb[b], torch.full_like(rgb[b], 0.5))]
                if a != b:
                    portrait = "frontal" if abs(away[a]) < FRONTAL_DEG else "turned"
                    errors[region, portrait, turn].append(torch.stack(pair))


def azimuth_deg(camera: Camera) -> float:
    """Return from which side a camera sees a head that faces forward [degrees]."""
    x, _, z = camera.T_cam_world[:3, :3].mT @ torch.tensor([0.0, 0.0, -1.0])
    return float(torch.rad2deg(torch.atan2(x, z)))


def under_shoulders(head: Head, camera: Camera, T_world_joint: Tensor) -> Tensor:
    """Return the rows, as a mask, below the height at which the torso begins."""
    top = transform(T_world_joint[0], torch.tensor([[0.0, torso(head).shoulders_y + FADE_M[0], 0.0]]))
    row = camera.project(top)[0][0, 1]
    return (torch.arange(camera.height) > row).float()[None, :, None].expand(1, -1, camera.width)


if __name__ == "__main__":
    main()
