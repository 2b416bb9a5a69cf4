"""Malformed inputs: spoil real files of every format and give them to every command that reads them.

Usage: `.venv/bin/python tools/campaigns/malformed.py --mutants 10000 --seed 0 --work FOLDER`. A mutant may end a
command with exit code 0 or 2 (one line), within a minute and 2 GiB, and must leave no process, no temporary file and
no half-written result; nothing outside its folder is opened. Whatever breaks this is a fault: it is listed by the line
it came from, and its input is kept in FOLDER/faults. Exit code 1 if there was any.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import corpus
from mutations import mutate
from warm import Job, Outcome, Runner, import_everything, warm_up

LIMIT_S = 60.0
PEAK_BYTES = 2 * 1024**3
JOBS = 200
"""Of one fork: it carries what commands leave in memory from one to the next."""


@dataclass(frozen=True)
class Target:
    """A command, the files it reads, and which of them are spoilt."""

    name: str
    line: str
    """`{c}` is the corpus; the working directory holds copies of `inputs`."""
    inputs: tuple[str, ...]
    spoilt: tuple[str, ...]
    """Patterns below the inputs, one of which is drawn first, then one of its files."""
    share: float = 1.0
    """How often, beside the others."""
    out: str = "out"
    partial: bool = False
    """Whether a refused input may leave a folder: runs that are resumed."""
    short: bool = False
    """Whether the short campaign has it."""


WARP = "--generator warp --preset debug --frames 1"
TARGETS = [
    *(
        Target(f"track {s}", f"track me.{s} --size 64 --out out", (f"me.{s}",), (f"me.{s}",), share, short=s == "png")
        for s, share in zip(corpus.PICTURES, (1.0, 0.3, 0.4, 0.2, 0.4, 0.8, 0.6), strict=True)
    ),
    *(
        Target(f"track {s}", f"track me.{s} --size 64 --limit 2 --out out", (f"me.{s}",), (f"me.{s}",), 0.4)
        for s in corpus.FILMS
    ),
    Target(
        "track --mask", "track me.bmp --mask mask.png --size 64 --out out", ("me.bmp", "mask.png"), ("mask.png",), 0.3),
    Target("live", "live me.ts --avatar {c}/avatar --frames 2 --size 64 --out out", ("me.ts",), ("me.ts",), 0.3),
    Target("import compact", "import compact compact.g4d out", ("compact.g4d",), ("compact.g4d",), 4.0, short=True),
    Target("view", "view compact.g4d --port 0 --size 64 --seconds 0.05", ("compact.g4d",), ("compact.g4d",), 1.0, ""),
    Target(
        "export ply", "export avatar out.ply", ("avatar",),
        ("avatar/config.json", "avatar/avatar.safetensors", "avatar/params.npz"), 4.0, "out.ply", short=True,
    ),
    Target(
        "export compact", "export avatar out.g4d --to compact", ("avatar",),
        ("avatar/*.json", "avatar/*.safetensors", "avatar/params.npz"), 0.2, "out.g4d",
    ),
    Target(
        "render", "render avatar --frames 1 --size 32 --out out.mp4", ("avatar",),
        ("avatar/config.json", "avatar/avatar.safetensors", "avatar/params.npz"), 0.6, "out.mp4",
    ),
    Target(
        "weights", "export {c}/avatar out --to ply-sequence --driving weights.jsonl", ("weights.jsonl",),
        ("weights.jsonl",), 1.5,
    ),
    Target(
        "weights json", "export {c}/avatar out --to ply-sequence --driving weights.json", ("weights.json",),
        ("weights.json",), 0.5,
    ),
    Target(
        "export driven", "export {c}/avatar out.ply --driving world/train_1", ("world",),
        ("world/train_1/transforms.json", "world/train_1/*/*.npz", "world/train_1/*/*.png", "world/train_1/*.*"), 0.6,
        "out.ply",
    ),
    Target(
        "export vhap", "export flame_clip out --to vhap", ("flame_clip",),
        ("flame_clip/transforms.json", "flame_clip/flame_param/*.npz", "flame_clip/*.npz", "flame_clip/*/*.png"), 3.0,
        short=True,
    ),
    Target(
        "import vhap", "import vhap sets/vhap out --size 48", ("sets/vhap",),
        ("sets/vhap/*.json", "sets/vhap/flame_param/*.npz", "sets/vhap/*.npz", "sets/vhap/images/*"), 0.7,
    ),
    Target(
        "import pixel3dmm", "import pixel3dmm sets/pixel3dmm/tracking out --size 48", ("sets/pixel3dmm",),
        ("sets/pixel3dmm/**/*.frame", "sets/pixel3dmm/**/*.frame", "sets/pixel3dmm/**/*.png", "sets/pixel3dmm/**/*.*"),
        0.7,
    ),
    Target(
        "import cap4d", "import cap4d sets/cap4d out --size 48", ("sets/cap4d",),
        ("sets/cap4d/**/*.npz", "sets/cap4d/**/*.*"), 0.6,
    ),
    Target(
        "import nersemble",
        "import nersemble sets/nersemble out --params sets/params --head openhead --size 48 --limit 1",
        ("sets/nersemble", "sets/params"),
        ("sets/nersemble/**/*.json", "sets/nersemble/**/*.npy", "sets/nersemble/**/*.mp4", "sets/nersemble/**/*.*",
         "sets/params/*"), 0.6,
    ),
    Target(
        "import renderme360", "import renderme360 sets/renderme out --size 48 --limit 1", ("sets/renderme",),
        ("sets/renderme/*.smc",), 0.8,
    ),
    Target(
        "import synthhuman", "import synthhuman sets/synthhuman out --size 48", ("sets/synthhuman",),
        ("sets/synthhuman/**/*.*",), 0.7,
    ),
    Target(
        "import gaussian-avatars", "import gaussian-avatars ga out --head {c}/flame/flame2023.pkl", ("ga",),
        ("ga/*.ply", "ga/*.npz", "ga/*.*"), 0.4,
    ),
    Target(
        "import portraits", "import portraits photographs out --size 64 --workers 1", ("photographs",),
        ("photographs/*",), 0.3,
    ),
    Target(
        "FLAME pickle", "import vhap {c}/sets/vhap out --size 48 --limit 1 --head flame2023.pkl",
        ("sets/models/flame2023.pkl",), ("**/flame2023.pkl",), 1.5,
    ),
    Target(
        "fit", "fit warp --preset debug --iterations 1 --out out", ("warp",),
        ("warp/transforms.json", "warp/transforms.json", "warp/*/*.npz", "warp/*/*.png", "warp/*.*"), 0.05,
        partial=True,
    ),
    Target(
        "fit resumed", "fit {c}/warp --preset debug --iterations 12 --out avatar", ("avatar",),
        ("avatar/*.json", "avatar/*.safetensors", "avatar/*.*"), 0.1, "avatar", True,
    ),
    Target(
        "synthesize",
        "synthesize --portrait world/train_0 --driving world/train_1 --generator warp --preset debug --out out",
        ("world",), ("world/*/transforms.json", "world/*/*/*.npz", "world/*/*/*.png", "world/train_0/*.*"), 0.08,
    ),
    Target(
        "animate", "animate --portrait {c}/world/train_0 --driving {c}/world/train_1 --preset debug --frames 1 "
        "--model runs/image/model --out out", ("runs/image/model",),
        ("runs/image/model/**/*.json", "runs/image/model/**/*.safetensors"), 0.25,
    ),
    Target(
        "train from stores", "train vae --preset debug --data stores --workers 0 --steps 1 --out out", ("stores",),
        ("stores/**/*.json", "stores/**/*.npy", "stores/**/*.*"), 0.5, partial=True,
    ),
    Target(
        "train from clips",
        "train image --preset debug --data world --workers 0 --steps 1 --vae {c}/runs/vae/vae --out out",
        ("world",), ("world/*/transforms.json", "world/*/*/*.npz", "world/*/*/*.png", "world/*/*.*"), 0.05,
        partial=True,
    ),
    Target(
        "train resumed", "train vae --preset debug --data {c}/stores --workers 0 --steps 1 --out runs/vae",
        ("runs/vae",), ("runs/vae/*.json", "runs/vae/*.jsonl", "runs/vae/*.safetensors", "runs/vae/*/*"), 0.15,
        "runs/vae", True,
    ),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first one; the seed and it make a mutant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/campaign"))
    parser.add_argument("--only", nargs="*", default=[], help="names of targets")
    parser.add_argument("--short", action="store_true", help="the few targets whose files need no training")
    args = parser.parse_args()
    import_everything()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.short:
        source = corpus.make_short((args.work / "corpus").resolve())
    else:
        source = corpus.make((args.work / "corpus").resolve())
        warm_up(source)
    chosen = [t for t in TARGETS if (t.short or not args.short) and (not args.only or t.name in args.only)]
    runner = Runner(JOBS)
    tally: dict[str, Counter] = {t.name: Counter() for t in chosen}
    faults: dict[str, list[str]] = {}
    slowest, peak, start = 0.0, 0, time.monotonic()
    with (args.work / "mutants.jsonl").open("a") as log:
        for n in range(args.first, args.first + args.mutants):
            random = Random(f"{args.seed} {n}")
            target = random.choices(chosen, [t.share for t in chosen])[0]
            outcome, how, wrong, folder = one(runner, target, source, args.work.resolve(), n, random)
            tally[target.name][str(outcome.code)] += 1
            slowest, peak = max(slowest, outcome.seconds), max(peak, outcome.peak_bytes)
            record = {"n": n, "target": target.name, "how": how, "wrong": wrong, **asdict(outcome)}
            log.write(json.dumps(record) + "\n")
            log.flush()
            for kind in wrong:
                if kind not in faults:
                    print(f"{n}: {target.name}, {how}: {kind}", flush=True)
                faults.setdefault(kind, []).append(f"{n} {target.name} {how}")
            if wrong and len(faults[wrong[0]]) <= 3:
                kept = args.work / "faults" / f"{args.seed}_{n:06d}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.move(folder, kept)
            shutil.rmtree(folder, ignore_errors=True)
    report(args, tally, faults, slowest, peak, time.monotonic() - start)
    return 1 if faults else 0


def one(
    runner: Runner, target: Target, source: Path, work: Path, n: int, random: Random
) -> tuple[Outcome, str, list[str], Path]:
    """Make a mutant and run it: (outcome, what was done to which file, faults, its folder)."""
    folder = work / "now" / f"{n:06d}"
    (work / "faults").mkdir(exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    for name in target.inputs:
        copy(source / name, folder / name)
    files: list[Path] = []
    while not files:
        files = sorted(p for p in folder.glob(random.choice(target.spoilt)) if p.is_file() and p.name != ".lock")
    path = random.choice(files)
    how = f"{mutate(path, random)} of {path.relative_to(folder)}"
    before = names(folder)

    outcome = runner.call(Job(target.line.format(c=source).split(), folder, (source,), own_tmp), LIMIT_S)
    return outcome, how, judge(target, outcome, folder, before), folder


def own_tmp() -> None:
    """Let temporary files be where they are counted."""
    os.environ["TMPDIR"] = tempfile.tempdir = str(Path.cwd() / "tmp")


def copy(source: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, to)
    else:
        shutil.copy(source, to)


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def judge(target: Target, outcome: Outcome, folder: Path, before: set[str]) -> list[str]:
    """Return what is wrong with an outcome, in words that are the same for the same cause."""
    wrong = []
    if outcome.code is None:
        wrong.append(f"{target.name}: over {LIMIT_S:.0f} s")
    elif outcome.code not in (0, 2):
        wrong.append(outcome.where or f"{target.name}: exit code {outcome.code}: {outcome.text[-200:]}")
    elif "out of memory" in outcome.text:
        wrong.append(f"{target.name}: out of memory")
    elif outcome.peak_bytes > PEAK_BYTES:
        wrong.append(f"{target.name}: {outcome.peak_bytes / 1024**3:.1f} GiB")
    if "Warning:" in outcome.text:
        line = next(line for line in outcome.text.splitlines() if "Warning:" in line)
        wrong.append(f"warning {line.split('/')[-1]}")
    if "Exception ignored" in outcome.text:
        wrong.append(f"{target.name}: exception ignored")
    wrong += [f"{target.name}: left a process {p.split()[1]}" for p in outcome.left]
    wrong += [f"{target.name}: {t}" for t in outcome.trespasses]
    new = names(folder) - before
    # torch makes a folder for compiled code that it keeps.
    if any(p.startswith("tmp/") and not p.startswith("tmp/torchinductor") for p in new):
        wrong.append(f"{target.name}: temporary files left")
    if any(p.endswith((".part", ".old")) for p in new):
        wrong.append(f"{target.name}: half-written")
    made = {p.split("/")[0] for p in new} - {"tmp"}
    if outcome.code == 2 and made and not target.partial and "are kept in" not in outcome.text:
        wrong.append(f"{target.name}: refused, and yet made {sorted(made)}")
    if outcome.code == 0 and target.out and not (folder / target.out).exists():
        wrong.append(f"{target.name}: done, and nothing made")
    return wrong


def report(args, tally, faults, slowest: float, peak: int, seconds: float) -> None:
    """Print the tables."""
    print("\n| command | mutants | exit 0 | exit 2 | others |\n|---|---|---|---|---|")
    for name, codes in tally.items():
        others = sum(codes.values()) - codes["0"] - codes["2"]
        print(f"| {name} | {sum(codes.values())} | {codes['0']} | {codes['2']} | {others} |")
    print(f"\n{args.mutants} mutants (seed {args.seed}, from {args.first}) in {seconds:.0f} s,")
    print(f"the slowest {slowest:.1f} s, at most {peak / 1024**2:.0f} MiB each; {len(faults)} kinds of fault")
    for kind, where in sorted(faults.items(), key=lambda item: -len(item[1])):
        print(f"- {len(where)} × {kind} (first: {where[0]})")


if __name__ == "__main__":
    raise SystemExit(main())
