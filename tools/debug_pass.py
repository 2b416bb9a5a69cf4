"""Run every command once at its smallest size, in order, in one temporary folder; then bad input.

Usage: `.venv/bin/python tools/debug_pass.py`. A command that is in the CLI's table but in no recipe here fails
the pass, and so does one that writes less than it promised, or anything at all when its input is bad. Nothing is
downloaded, no detector is needed, and the model is one that the pass trains itself.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from geodiff4d.cli import COMMANDS

LIMIT_SECONDS = float(os.environ.get("LIMIT_SECONDS", "300"))
"""For one command; a machine that does other things needs more."""


@dataclass(frozen=True)
class Recipe:
    """One command line, what it must leave behind and what it must not."""

    line: str
    """Arguments after `geodiff4d`; the working directory is the pass's temporary folder."""
    outputs: tuple[str, ...] = ()
    """Files that must exist afterwards and not be empty (globs allowed)."""
    says: str = ""
    """Text that must appear in the output."""
    code: int = 0
    absent: tuple[str, ...] = ()
    """What must not exist afterwards: a failing command leaves nothing half-written."""
    prepare: Callable[[Path], None] | None = None
    """Called with the pass's folder before the command."""


def jobs_of_a_fleet(folder: Path) -> None:
    """One job."""
    job = {"name": "one", "run": "synth {out} --preset debug --subjects 1 --frames 1 --views 1 --workers 1"}
    (folder / "jobs.jsonl").write_text(json.dumps(job))


def broken_picture(folder: Path) -> None:
    """Half a picture file."""
    whole = next((folder / "world/train_0/images").iterdir()).read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])


def photograph(folder: Path) -> None:
    """Somebody before a background, large enough to be tracked."""
    from geodiff4d.core.images import write_image
    from geodiff4d.evaluate.tracking import make_case

    write_image(folder / "me.png", make_case(1, "val", size=256).image)


def photographs(folder: Path) -> None:
    """Two people, of whom one has two photographs."""
    from geodiff4d.core.images import write_image
    from geodiff4d.evaluate.tracking import make_case

    for name, seed in (("anna_1", 1), ("anna_2", 1), ("left_1", 2)):
        write_image(folder / f"photographs/{name}.png", make_case(seed, "val", size=256).image)


def film(folder: Path) -> None:
    """The photograph ten times over, in a container that can be read while it is written."""
    import av

    from geodiff4d.core.images import read_image, to_uint8

    picture = to_uint8(read_image(folder / "me.png"))
    with av.open(str(folder / "me.ts"), "w", format="mpegts") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        for _ in range(10):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def cut_picture(folder: Path) -> None:
    """A clip whose first picture ends in the middle, as an interrupted copy would."""
    shutil.copytree(folder / "world/train_0", folder / "cut")
    for picture in (folder / "cut/images").iterdir():
        picture.write_bytes(picture.read_bytes()[:400])


def empty_clip(folder: Path) -> None:
    (folder / "empty").mkdir()
    meta = json.loads((folder / "world/train_1/transforms.json").read_text())
    (folder / "empty/transforms.json").write_text(json.dumps(meta | {"frames": []}))


def weights(folder: Path) -> None:
    """A stream of expression weights and one with a slip in its second line; a table of them and half of one."""
    table = "Timecode,BlendshapeCount,JawOpen\n" + "".join(f"0:0:{i // 5}:{i % 5},61,0.{i}\n" for i in range(9))
    (folder / "take.csv").write_text(table)
    (folder / "cut.csv").write_text(table[: len(table) // 2])
    (folder / "weights.jsonl").write_text('{"jawOpen": 0.2}\n{"jawOpen": 0.8, "eyeBlinkLeft": 1}\n')
    (folder / "slip.jsonl").write_text('{"jawOpen": 0.2}\n{"jawOpne": 0.8}\n')


def cut_compact(folder: Path) -> None:
    """Half a compact avatar."""
    whole = (folder / "exported.g4d").read_bytes()
    (folder / "cut.g4d").write_bytes(whole[: len(whole) // 2])


def data_sets(folder: Path) -> None:
    """Small data sets and tracks in the formats of the real ones, and their damaged twins (tests/mini_*.py)."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    import mini_datasets as mini
    from mini_cap4d import make_cap4d, make_fit
    from mini_pixel3dmm import make_pixel3dmm
    from mini_tracks import make_head
    from mini_vhap import make_vhap

    show = mini.performance(timesteps=2)
    mini.make_nersemble(folder / "sets/nersemble", show, mini.COLOUR_MATRIX)
    mini.make_renderme(folder / "sets/renderme", show)
    mini.make_synthhuman(folder / "sets/synthhuman", show)
    mini.write_params(folder / "sets/params", show.params)
    for video in sorted((folder / "sets/nersemble").rglob("*.mp4")):
        cut = folder / "sets/cut" / video.relative_to(folder / "sets/nersemble")
        cut.parent.mkdir(parents=True, exist_ok=True)
        cut.write_bytes(video.read_bytes()[:200])
    shutil.copytree(folder / "sets/nersemble/017/calibration", folder / "sets/cut/017/calibration")
    smc = (folder / "sets/renderme/0026_e3_raw.smc").read_bytes()
    (folder / "sets/cut_0026_e3_raw.smc").write_bytes(smc[: len(smc) // 2])
    models = folder / "sets/models"
    make_vhap(folder / "sets/vhap", make_head(models, "flame2023.pkl")[0])
    make_pixel3dmm(folder / "sets/pixel3dmm", make_head(models, "flame2020.pkl")[0])
    make_cap4d(folder / "sets/cap4d", make_fit(), make_head(models, "flame2023_no_jaw.pkl"))
    shutil.copytree(folder / "sets/vhap", folder / "sets/mirrored")
    meta = json.loads((folder / "sets/vhap/transforms.json").read_text())
    meta["frames"][0]["transform_matrix"][0] = [-x for x in meta["frames"][0]["transform_matrix"][0]]
    (folder / "sets/mirrored/transforms.json").write_text(json.dumps(meta))


PEOPLE = "--portrait world/train_0 --driving world/train_1"
MODEL = "--preset debug --model runs/all/image/out/model"
DECODED = "--preset debug --model runs/all/decoder/out/model"


def bad(line: str, says: str, prepare: Callable[[Path], None] | None = None) -> Recipe:
    """A command that must end in one line that says what is wrong, and leave no output."""
    return Recipe(f"{line} --out bad/out", says=says, code=2, absent=("bad/out", "bad/.*"), prepare=prepare)


def bad_import(line: str, says: str, prepare: Callable[[Path], None] | None = None) -> Recipe:
    """An import that must end in one line and leave nothing."""
    return Recipe(line, says=says, code=2, absent=("bad/out", "bad/.*"), prepare=prepare)


RECIPES = [
    # In the order of the pipeline: later lines read what earlier ones wrote.
    Recipe("doctor", says="needs attention|ready"),
    Recipe("bench world --preset debug --json bench.json", ("bench.json",), says="images_per_second"),
    Recipe("bench fit --preset debug --threads 1 --json fit.json", ("fit.json",), says="iterations_per_second"),
    Recipe("bench render --preset debug --threads 1 --json render.json", ("render.json",), says="frames_per_second"),
    Recipe("bench splat --preset debug --threads 1 --json splat.json", ("splat.json",), says="ms_forward_backward"),
    Recipe("bench unet --preset debug --threads 1 --json unet.json", ("unet.json",), says="both branches in one batch"),
    Recipe(
        "synth world --preset debug --subjects 2 --frames 4 --views 2",
        ("world/train_0/transforms.json", "world/train_1/flame_param/00003.npz", "world/train_sheet.png"),
    ),
    Recipe(
        "fleet jobs.jsonl --out fleet --workers 2",
        ("fleet/one/out/train_0/transforms.json", "fleet/one/job.json", "fleet/failed.json", "fleet/fleet.jsonl"),
        says="1 of 1 jobs done",
        prepare=jobs_of_a_fleet,
    ),
    Recipe("fleet nobody.jsonl --out bad/out", says="nobody.jsonl", code=2, absent=("bad/out", "bad/.*")),
    Recipe(
        "train all --preset debug --photographs photographs --workers 1 --out runs/all",
        (
            *(f"runs/all/{stage}" for stage in ("vae/out/vae/model*", "image/out/model/unet/model*", "figures.json")),
            *(
                f"runs/all/video/out/{name}"
                for name in ("model/unet/model*.safetensors", "curves.png", "pictures/*.png")
            ),
            *(f"runs/all/data/{name}" for name in ("people/val/people.json", "faces/val/faces.json")),
            *(f"runs/all/data/rows/{name}" for name in ("photographs/rgb.npy", "world_val/rgb.npy")),
            *(
                f"runs/all/weights/{name}/*.safetensors"
                for name in ("embedded/*", "perception", "reader", "person", "identity")
            ),
        ),
        says="| video | flicker [levels of 255] | ",
        prepare=photographs,
    ),
    Recipe("train all --preset debug --photographs photographs --workers 1 --out runs/all", says="0.0 h left"),
    Recipe(
        "encode world --preset debug --vae runs/all/vae/out/vae --workers 1 --out shards",
        ("shards/shard-00000.npy", "shards/index.safetensors"),
        says="2 takes, 16 frames",
    ),
    Recipe(
        "train image --preset debug --data shards world runs/all/data --workers 1 --vae runs/all/vae/out/vae --steps 2 "
        "--out runs/mixed",
        ("runs/mixed/model/unet/model*.safetensors", "runs/mixed/log.jsonl"),
        says="% of the samples",
    ),
    Recipe(
        "track me.png --size 128 --out runs/me",
        ("runs/me/transforms.json", "runs/me/overlay.png", "runs/me/normals/*.png"),
        says="1 frame",
        prepare=photograph,
    ),
    Recipe(
        "evaluate tracking --count 1 --split val --size 128 --out runs/tracking",
        ("runs/tracking/metrics.json", "runs/tracking/embedded.png"),
        says="rotation_deg",
    ),
    Recipe(
        "evaluate tracking --sequences 1 --count 1 --frames 3 --split val --size 128 --out runs/tracking_videos",
        ("runs/tracking_videos/metrics.json", "runs/tracking_videos/table.md", "runs/tracking_videos/videos/*.mp4"),
        says="jitter at rest",
    ),
    Recipe(
        f"evaluate pairs photographs {MODEL} --methods video_model mesh_warp avatar --out runs/pairs",
        tuple(f"runs/pairs/{name}" for name in ("metrics.json", "table.md", "sheet.png", "frames/anna_avatar.png")),
        says="left: number of photographs: 1, expected 2",
    ),
    Recipe(
        "import portraits photographs portraits --size 128 --workers 1",
        ("portraits/anna_1/transforms.json", "portraits/left_1/overlay.png"),
        says="3 tracked portraits, 0 photographs left out",
    ),
    Recipe(
        "train image --preset debug --data runs/all/data --photographs portraits --workers 1 --steps 2 "
        "--vae runs/all/vae/out/vae --out runs/real",
        ("runs/real/model/unet/model*.safetensors", "runs/real/log.jsonl"),
        says="25 % of the samples",
    ),
    Recipe(
        f"evaluate photographs portraits {DECODED} --size 128 --out runs/photographs",
        ("runs/photographs/metrics.json", "runs/photographs/table.md", "runs/photographs/sheet.jpg"),
        says="3 photographs at 128 px",
    ),
    Recipe(
        "animate --portrait portraits/anna_1 --driving world/train_1 --preset debug --model runs/all/decoder/out/model "
        "--size 128 --frames 2 --out runs/large",
        ("runs/large/video.mp4",),
        says="2 frames",
    ),
    Recipe(
        "synthesize --portrait photographs/anna_1.png photographs/anna_2.png --driving world/train_1 "
        "--preset debug --generator warp --views 2 --frames 2 --out runs/several",
        ("runs/several/transforms.json",),
        says="2 images of one person are merged",
    ),
    bad(f"animate --portrait me.png world/train_0 --driving world/train_1 {MODEL}", says="a folder: expected it alone"),
    bad(f"animate --portrait me.png nobody.png --driving world/train_1 {MODEL}", says="nobody.png does not exist"),
    bad(f"animate {PEOPLE} {MODEL} --size 128", says="no guided decoder"),
    bad(f"animate {PEOPLE} {DECODED} --size 70", says="a multiple of 4 from 64"),
    bad("evaluate photographs nowhere --preset debug", says="nowhere is not a folder"),
    bad_import("import portraits world/train_0/flame_param bad/out", says="has no photographs"),
    Recipe(
        f"evaluate driving --portraits me.png --drivers world/train_1 {MODEL} --methods video_model mesh_warp avatar "
        "--frames 3 --out runs/driving",
        ("runs/driving/metrics.json", "runs/driving/table.md", "runs/driving/videos/me_by_train_1_avatar.mp4"),
        says="1 portraits, each driven by 1 videos",
    ),
    bad("evaluate pairs world/train_0/flame_param --preset debug", says="no person with two"),
    bad(
        f"evaluate driving --portraits me.png --drivers nobody.mp4 {MODEL}",
        says="--drivers nobody.mp4 does not exist",
    ),
    bad("evaluate pairs photographs --judges nowhere", says="expected bin/python"),
    Recipe(
        f"evaluate video {MODEL} --count 1 --out runs/video_figures",
        ("runs/video_figures/metrics.json",),
        says="expression_top3",
    ),
    Recipe(
        f"evaluate self {MODEL} --workers 1 --out runs/self",
        tuple(f"runs/self/{name}" for name in ("metrics.json", "table.md", "report.html", "clips/*/scores.json")),
        says="n/a, LPIPS: give --lpips",
    ),
    Recipe(
        f"evaluate cross {MODEL} --methods video_model mesh_warp --data runs/self/data --out runs/cross",
        ("runs/cross/metrics.json", "runs/cross/table.md", "runs/cross/report.html"),
        says="Cross-reenactment",
    ),
    Recipe(
        f"evaluate cross-view {MODEL} --subjects 1 --frames 2 --data runs/self/data --out runs/cross_view",
        ("runs/cross_view/metrics.json", "runs/cross_view/table.md", "runs/cross_view/report.html"),
        says="expression encoder's latents",
    ),
    Recipe(
        "evaluate self --data nowhere --out runs/no_data",
        says="expected clips",
        code=2,
        absent=("runs/no_data",),
    ),
    Recipe(
        f"demo {MODEL} --out runs/demo",
        tuple(f"runs/demo/{name}" for name in ("report.html", "metrics.json", "generated.mp4", "avatar.mp4")),
    ),
    Recipe(
        f"animate {PEOPLE} {MODEL} --out runs/animate",
        tuple(f"runs/animate/{name}.mp4" for name in ("video", "normals", "side_by_side")),
    ),
    Recipe(
        f"animate {PEOPLE} --preset debug --model runs/all/video/out/model --out runs/video_animate",
        ("runs/video_animate/video.mp4",),
    ),
    Recipe(
        f"animate {PEOPLE} {MODEL} --generator warp --camera driver --out runs/followed", ("runs/followed/video.mp4",)
    ),
    Recipe(
        f"synthesize {PEOPLE} {MODEL} --out runs/clip",
        ("runs/clip/transforms.json", "runs/clip/normals/*.png", "runs/clip/expression_tokens.safetensors"),
    ),
    Recipe(f"synthesize {PEOPLE} --preset debug --generator warp --out runs/warp", ("runs/warp/transforms.json",)),
    Recipe(
        "fit runs/warp --preset debug --out runs/avatar", ("runs/avatar/avatar.safetensors", "runs/avatar/preview.png")
    ),
    Recipe(
        "fit world/train_0 --preset debug --ablate normal-source refine remesh deformation dynamics densify "
        "--hold-out-views 1 --hold-out-times 0.3 --out runs/ablated",
        ("runs/ablated/avatar.safetensors", "runs/ablated/log.jsonl"),
        says="held-out times",
    ),
    Recipe(
        "fit world/train_0 --preset debug --ablate remesh deformation dynamics --out runs/plain",
        ("runs/plain/avatar.safetensors",),
    ),
    Recipe("render runs/avatar --driving world/train_1 --out runs/avatar.mp4", ("runs/avatar.mp4",)),
    Recipe("render runs/avatar --driving weights.jsonl --out runs/weights.mp4", ("runs/weights.mp4",), prepare=weights),
    Recipe("export runs/avatar exported.ply --set jawOpen=0.7 mouthSmileLeft=1", ("exported.ply",), says="Gaussians"),
    Recipe(
        "export runs/avatar exported_frames --to ply-sequence --driving weights.jsonl",
        ("exported_frames/frame_00001.ply", "exported_frames/sequence.json"),
    ),
    Recipe("export runs/plain take.html --driving take.csv", ("take.html",), says="9 frames"),
    Recipe("export runs/plain me.html --title me --origin https://example.org", ("me.html",), says="MB"),
    Recipe("export runs/avatar exported.glb", ("exported.glb",), says="MB"),
    Recipe("export runs/plain exported.sog --set jawOpen=0.7", ("exported.sog",), says="Gaussians"),
    Recipe("export runs/avatar exported.g4d --to compact", ("exported.g4d",), says="MB"),
    Recipe("verify runs/avatar exported.glb runs/avatar.mp4", says="untouched since it was signed"),
    Recipe("verify me.png", says="unsigned", code=1, prepare=photograph),
    Recipe("import compact exported.g4d imported/avatar", ("imported/avatar/avatar.safetensors",)),
    Recipe("view exported.g4d --port 0 --size 64 --seconds 1", says="http://127.0.0.1:"),
    Recipe("view runs/plain --port 0 --seconds 1", says="http://127.0.0.1:"),
    Recipe("studio --out runs/studio --port 0 --no-browser --seconds 1", ("runs/studio/token",), says="?token="),
    bad("studio --port 70000", says="expected 0 to 65535"),
    Recipe(
        "live me.ts --avatar runs/avatar --frames 8 --size 64 --out runs/live",
        ("runs/live/live.mp4", "runs/live/params.npz"),
        says="8 frames",
        prepare=film,
    ),
    Recipe("render runs/avatar --normals --frames 3 --camera front --out runs/normals.mp4", ("runs/normals.mp4",)),
    Recipe(
        f"reconstruct {PEOPLE} {MODEL} --out runs/one",
        ("runs/one/report.html", "runs/one/avatar.mp4", "runs/one/avatar/metrics.json"),
    ),
    Recipe(
        f"reconstruct {PEOPLE} --preset debug --generator warp --out runs/two",
        ("runs/two/report.html", "runs/two/avatar.mp4"),
    ),
    Recipe(
        "import nersemble sets/nersemble imported/nersemble --params sets/params --head openhead --size 96",
        ("imported/nersemble/017_EXP-1-head/transforms.json", "imported/nersemble/017_EXP-1-head/sheet.png"),
        prepare=data_sets,
    ),
    Recipe(
        "import nersemble sets/nersemble imported/nersemble --params sets/params --head openhead --size 96",
        says="4 frames",
    ),
    Recipe("import renderme360 sets/renderme imported/renderme", ("imported/renderme/0026_e3/flame_param/00001.npz",)),
    Recipe("import synthhuman sets/synthhuman imported/faces", ("imported/faces/faces_0000000/normals/00003_00.png",)),
    Recipe(
        "import vhap sets/vhap imported/vhap --head sets/models/flame2023.pkl",
        ("imported/vhap/flame_param/00002.npz", "imported/vhap/sheet.png"),
        says="6 frames",
    ),
    Recipe(
        "import pixel3dmm sets/pixel3dmm/tracking imported/pixel3dmm --head sets/models/flame2020.pkl",
        ("imported/pixel3dmm/clip_01*/normals/00002_00.png", "imported/pixel3dmm/clip_01*/sheet.png"),
    ),
    Recipe(
        "import cap4d sets/cap4d imported/cap4d --head sets/models/flame2023_no_jaw.pkl --limit 2",
        ("imported/cap4d/fg_masks/00001_01.png", "imported/cap4d/sheet.png"),
    ),
    Recipe("import cap4d sets/cap4d imported/cap4d", says="give the same --head as before", code=2),
    Recipe("export imported/vhap exported --to vhap", ("exported/transforms.json", "exported/flame_param/00002.npz")),
    Recipe("import vhap exported imported/again", ("imported/again/images/00002_08.png",), says="6 frames"),
    bad_import("export runs/avatar bad/out --to gaussian-avatars", says="needs FLAME with teeth"),
    bad_import("import compact cut.g4d bad/out", says="truncated", prepare=cut_compact),
    bad_import("import gaussian-avatars runs/avatar bad/out", says="needs --head"),
    bad_import("export runs/plain bad/out.html --driving cut.csv", says="columns, expected 3"),
    bad_import("export runs/avatar bad/out.html", says="the page cannot run"),
    bad_import("export runs/plain bad/out.html --face-landmarker cut.csv bad", says="expected MediaPipe's"),
    bad_import("export runs/plain bad/out.html --origin example.org", says="is no origin"),
    bad("render runs/avatar --driving slip.jsonl", says="bad/out is not a video"),
    Recipe(
        "render runs/avatar --driving slip.jsonl --out bad/out.mp4",
        says="line 2: names 'jawOpne'",
        code=2,
        absent=("bad/out.mp4", "bad/.*"),
    ),
    bad_import("export world/train_0 bad/out", says="VHAP's layout is FLAME's"),
    bad_import("import vhap sets/mirrored bad/out", says="mirrored"),
    bad_import("import pixel3dmm sets/pixel3dmm/tracking bad/out --head sets/models/flame2023.pkl", says="do not mix"),
    bad_import("import cap4d sets/vhap bad/out", says="no fit.npz"),
    bad_import("import nersemble sets/cut bad/out", says="no camera that can be read"),
    bad_import("import renderme360 sets/cut_0026_e3_raw.smc bad/out", says="truncated"),
    bad_import("import synthhuman world bad/out", says="no SynthHuman pictures"),
    bad_import("import nersemble sets/nersemble bad/out --params sets/params", says="--params needs --head"),
    bad_import("import nersemble nowhere bad/out", says="nowhere does not exist"),
    # The detector's environment is an installation of its own, which this pass does without (see `check`).
    bad("track world/train_0/reference.png --detector mediapipe", says="make track-env"),
    bad(f"animate --portrait world --driving world/train_1 {MODEL}", says="expected a folder with transforms.json"),
    bad("fit runs/me --preset debug --hold-out-views 1", says="1 camera(s), 1 cannot be held out"),
    bad("fit world/train_0 --preset debug --hold-out-times 2", says="--hold-out-times"),
    bad("live nobody.ts", says="nobody.ts does not exist"),
    bad("track broken.png", says="broken.png", prepare=broken_picture),
    bad("track world", says="directory"),
    bad("track me.png --points runs/me/transforms.json --out bad/out", says="expected one of right brow"),
    bad(f"animate --portrait cut --driving world/train_1 {MODEL}", says="cut/images/", prepare=cut_picture),
    bad(f"reconstruct --portrait world/train_0 --driving nobody.mp4 {MODEL}", says="nobody.mp4 does not exist"),
    bad(f"synthesize --portrait world/train_0 --driving empty {MODEL}", says="no frames", prepare=empty_clip),
    bad("fit empty --preset debug", says="no frames"),
    bad(
        "encode runs/all/data/people --preset debug --vae runs/all/vae/out/vae --workers 1",
        says="has nothing to train on",
    ),
    bad("train video --preset debug", says="needs a stage-1 model"),
    bad("train all --preset paper", says="--preset paper has no recipe"),
    bad("train video --preset debug --start nowhere", says="nowhere is not a video model"),
    bad("train image --preset debug --vae runs/all/vae/out/vae --data world nowhere", says="nowhere is not a folder"),
    bad("train image --preset paper --data world", says="--preset paper needs --sd"),
    bad(f"animate {PEOPLE} --preset debug --model nowhere", says="nowhere is not a video model"),
    bad(f"synthesize {PEOPLE} {MODEL} --head nowhere.npz", says="no head at nowhere.npz"),
]


def check(recipe: Recipe, folder: Path) -> str:
    """Run one recipe and return what is wrong, or nothing."""
    if recipe.prepare:
        recipe.prepare(folder)
    words = [sys.executable, "-m", "geodiff4d", *shlex.split(recipe.line)]
    environment = os.environ | {"GEODIFF4D_TRACK_ENV": "no-track-env"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # Every command would compile every module.
    try:
        done = subprocess.run(
            words, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {LIMIT_SECONDS} s"
    output = done.stdout + done.stderr
    wrong = []
    if done.returncode != recipe.code:
        wrong.append(f"exit code {done.returncode}, expected {recipe.code}")
    if recipe.code == 2 and len(done.stderr.strip().splitlines()) != 1:
        wrong.append("bad input must give exactly one line on stderr")
    if recipe.says and not any(text in output for text in recipe.says.split("|")):
        wrong.append(f"the output does not say {recipe.says!r}")
    for pattern in recipe.outputs:
        if not any(path.is_file() and path.stat().st_size for path in folder.glob(pattern)):
            wrong.append(f"{pattern} is missing or empty")
    wrong += [f"{pattern} should not exist" for pattern in recipe.absent if any(folder.glob(pattern))]
    if recipe.code != 2 and (left := half_written(folder)):
        wrong.append(f"half-written: {', '.join(left)}")
    return "; ".join(wrong) + (f"\n{output.strip()}" if wrong else "")


def half_written(folder: Path) -> list[str]:
    """Return what commands that have ended left unfinished."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*.part")]


def run(folder: Path, recipe: Recipe) -> tuple[Recipe, str]:
    """Run one recipe, say how it went, and return it with what is wrong."""
    start = time.monotonic()
    wrong = check(recipe, folder)
    print(f"{'FAIL' if wrong else 'ok':<5}{time.monotonic() - start:6.1f} s  geodiff4d {recipe.line}", flush=True)
    return recipe, wrong


def refusals() -> list[Recipe]:
    """Return the recipes of bad input, each with a folder of its own to write nothing into."""

    def own(recipe: Recipe, i: int) -> Recipe:
        line, says, *absent = (text.replace("bad/", f"bad/{i}/") for text in (recipe.line, recipe.says, *recipe.absent))
        return replace(recipe, line=line, says=says, absent=tuple(absent))

    return [own(recipe, i) for i, recipe in enumerate(r for r in RECIPES if r.code == 2)]


def main() -> int:
    covered = {shlex.split(recipe.line)[0] for recipe in RECIPES}
    failures = [f"{name}: no recipe in tools/debug_pass.py" for name in COMMANDS if name not in covered]
    with tempfile.TemporaryDirectory(prefix="geodiff4d-") as name, ThreadPoolExecutor(os.cpu_count()) as pool:
        here = partial(run, Path(name))
        # Good input goes on with what came before; bad input depends on nothing but that, and leaves nothing.
        results = [here(recipe) for recipe in RECIPES if recipe.code != 2]
        results += pool.map(here, refusals())
        failures += [f"geodiff4d {recipe.line}: {wrong}" for recipe, wrong in results if wrong]
        failures += [f"half-written: {path}" for path in half_written(Path(name))]
    for failure in failures:
        print(f"\n{failure}", file=sys.stderr)
    print(f"{len(RECIPES)} recipes, {len(COMMANDS)} commands, {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
