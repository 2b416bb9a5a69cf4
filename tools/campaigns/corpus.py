"""Small real files of every format that a command reads, made once by the commands themselves at debug size."""

import json
import shutil
import sys
from pathlib import Path

from warm import call

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPOSITORY / "tools"), str(REPOSITORY / "tests")]

PEOPLE = "--portrait world/train_0 --driving world/train_1 --preset debug"
LINES = [
    "synth world --preset debug --subjects 2 --frames 2 --views 2 --workers 1",
    "train vae --preset debug --data stores --workers 1 --steps 1 --out runs/vae",
    "train image --preset debug --data stores --workers 1 --steps 2 --vae runs/vae/vae --out runs/image",
    f"synthesize {PEOPLE} --generator warp --out warp",
    "fit warp --preset debug --iterations 12 --out avatar",
    "export avatar compact.g4d --to compact",
    "import vhap sets/vhap flame_clip --head sets/models/flame2023.pkl",
]
PICTURES = {"png": {}, "jpg": {"quality": 90}, "webp": {}, "bmp": {}, "tiff": {}, "gif": {}, "avif": {}}
FILMS = {
    "mp4": ("mp4", "libx264"), "mov": ("mov", "mpeg4"), "ts": ("mpegts", "mpeg2video"), "avi": ("avi", "mjpeg"),
    "webm": ("webm", "libvpx-vp9"), "mkv": ("matroska", "libx264"),
}  # fmt: skip


def make(folder: Path) -> Path:
    """Make the corpus, or keep the one that is there whole; returns the folder."""
    if (folder / "whole").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pictures(folder)
    films(folder)
    data_sets(folder)
    for line in LINES:
        done = call(line.split(), folder)
        if done.code != 0:
            raise SystemExit(f"geodiff4d {line}: {done.code}\n{done.text}\n{done.traceback}")
    (folder / "weights.jsonl").write_text('{"jawOpen": 0.2}\n{"jawOpen": 0.8, "eyeBlinkLeft": 1}\n{"time": 0.1}\n')
    (folder / "weights.json").write_text(json.dumps([{"jawOpen": 0.2}, {"jawOpen": 0.8}]))
    gaussian_avatars(folder)
    jobs(folder)
    (folder / "whole").touch()
    return folder


def make_short(folder: Path) -> Path:
    """Make what the short campaign needs, without rendering or training."""
    from avatars import painted_avatar, talking, with_networks
    from debug_pass import data_sets as write_data_sets
    from geodiff4d.avatar.compact import write_compact
    from geodiff4d.heads import load_head

    shutil.rmtree(folder, ignore_errors=True)
    for name in ("avatar", "world/train_0"):
        (folder / name).mkdir(parents=True)
    pictures(folder)
    write_data_sets(folder)
    head = load_head()
    with_networks(painted_avatar(head, talking(head, 2)), None).save(folder / "avatar")
    write_compact(folder / "avatar", folder / "compact.g4d")
    done = call(["import", "vhap", "sets/vhap", "flame_clip", "--head", "sets/models/flame2023.pkl"], folder)
    assert done.code == 0, done
    return folder


def pictures(folder: Path) -> None:
    """One person in every format, with EXIF; and a mask."""
    from PIL import Image

    from debug_pass import photograph

    photograph(folder)
    image = Image.open(folder / "me.png").convert("RGB").resize((128, 128))
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0xA405] = 35
    for suffix, options in PICTURES.items():
        more = {"exif": exif} if suffix in ("jpg", "webp", "png", "tiff") else {}
        image.save(folder / f"me.{suffix}", **options, **more)
    image.convert("L").point(lambda v: 255 * (v > 90)).save(folder / "mask.png")
    (folder / "photographs").mkdir()
    for name in ("anna_1.jpg", "anna_2.jpg"):
        shutil.copy(folder / "me.jpg", folder / "photographs" / name)


def films(folder: Path) -> None:
    """Five frames in every container."""
    import av
    import numpy as np
    from PIL import Image

    picture = np.asarray(Image.open(folder / "me.bmp").convert("RGB"))
    for suffix, (container, codec) in FILMS.items():
        with av.open(str(folder / f"me.{suffix}"), "w", format=container) as file:
            stream = file.add_stream(codec, rate=25)
            stream.height, stream.width = picture.shape[:2]
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for t in range(5):
                frame = av.VideoFrame.from_ndarray(np.roll(picture, t, 1), format="rgb24")
                file.mux(stream.encode(frame))
            file.mux(stream.encode())


def data_sets(folder: Path) -> None:
    """The tests' small data sets, in the formats of the real ones."""
    from debug_pass import data_sets as write

    (folder / "world/train_0").mkdir(parents=True)
    write(folder)
    shutil.rmtree(folder / "world")


def jobs(folder: Path) -> None:
    """Two jobs of a fleet."""
    lines = [
        {"name": "ply", "run": ["export", str(folder / "avatar"), "{out}", "--to", "ply-sequence", "--no-sign"]},
        {"name": "track", "run": ["track", str(folder / "me.mp4"), "--size", "64", "--out", "{out}"]},
    ]
    (folder / "jobs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def gaussian_avatars(folder: Path) -> None:
    """An avatar in GaussianAvatars' layout, on a made-up FLAME."""
    import flame_files
    from avatars import painted_avatar, talking
    from geodiff4d.avatar.export_gaussian_avatars import export_gaussian_avatars
    from geodiff4d.heads import flame

    head = flame.load(flame_files.write_model(folder / "flame/flame2023.pkl", flame_files.arrays()))
    export_gaussian_avatars(painted_avatar(head, talking(head, 2), gaussians=10_500), folder / "ga")
    flame.LOADED.clear()
