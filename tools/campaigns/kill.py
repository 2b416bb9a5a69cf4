"""Kill -9 at random moments: every stage is killed again and again, run to the end, and compared with a quiet run.

Usage: `.venv/bin/python tools/campaigns/kill.py --moments 20 --seed 0 --work FOLDER`. For each stage and moment the
command is killed with all its children's parent gone, `--kills` times at moments drawn evenly from the quiet run's
time, and then run to its end. The end must be the quiet run's to the bit, times and rates aside; a killed command may
leave a run that is resumed or nothing at all under its own name, and no process. Exit code 1 if anything differed.
"""

import argparse
import hashlib
import json
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random

import corpus
from warm import call, import_everything, warm_up

CLOCKS = re.compile(r"second|started|minutes|elapsed|time_s|gigabytes|memory|speed|^eta$|^built$|^command$|^made_of$")
"""JSON keys that match are times and rates, hashes of them, or have the name of the working directory in them."""
UNLIKE = (".lock", "torch", "report.html", "diff.patch", "curves.png", "fleet.jsonl", "log.txt")
"""Files that name times or attempts, or are locks."""


@dataclass(frozen=True)
class Stage:
    """A command that writes `out` at debug size."""

    name: str
    line: str
    out: str


DEBUG, SAME = "--preset debug", "--no-sign"
"""Signatures have a time and random numbers in them: what is compared to the bit is not signed."""
PEOPLE = "--portrait {c}/world/train_0 --driving {c}/world/train_1"
STAGE_1 = "{c}/runs/image/model"
STAGES = [
    Stage("track", "track {c}/me.mp4 --size 64 --out out", "out"),
    Stage("synth", f"synth out {DEBUG} --subjects 2 --frames 2 --views 2 --workers 2 {SAME}", "out"),
    Stage("train vae", f"train vae {DEBUG} --data data --workers 1 --out out", "out"),
    Stage("train image",
          f"train image {DEBUG} --data {{c}}/stores --workers 1 --vae {{c}}/runs/vae/vae --out out", "out"),
    Stage("train video", f"train video {DEBUG} --data data --workers 1 --start {STAGE_1} --out out", "out"),
    Stage("train perception", f"train perception {DEBUG} --data people --workers 1 --out out", "out"),
    Stage("train reader", f"train reader {DEBUG} --data faces --workers 1 --out out", "out"),
    Stage("train decoder", f"train decoder {DEBUG} --data rows --start {STAGE_1} --workers 1 --out out", "out"),
    Stage("synthesize", f"synthesize {PEOPLE} {DEBUG} --model {STAGE_1} --out out {SAME}", "out"),
    Stage("fit", f"fit {{c}}/warp {DEBUG} --out out {SAME}", "out"),
    Stage("evaluate", f"evaluate video {DEBUG} --model {STAGE_1} --count 1 --out out", "out"),
    Stage("export ply", f"export {{c}}/avatar out --to ply-sequence {SAME}", "out"),
    Stage("export compact", f"export {{c}}/avatar out.g4d --to compact {SAME}", "out.g4d"),
    Stage("import",
          "import nersemble {c}/sets/nersemble out --params {c}/sets/params --head openhead --size 48", "out"),
    Stage("render", f"render {{c}}/avatar --frames 4 --size 64 --out out.mp4 {SAME}", "out.mp4"),
    Stage("reconstruct", f"reconstruct {PEOPLE} {DEBUG} --generator warp --out out {SAME}", "out"),
    Stage("fleet", "fleet {c}/jobs.jsonl --workers 1 --out out", "out"),
    Stage("demo", f"demo {DEBUG} --out out {SAME}", "out"),
]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--kills", type=int, default=1, help="kills in a row before the run that may end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/campaign"))
    parser.add_argument("--only", nargs="*", default=[], help="names of stages")
    args = parser.parse_args()
    import_everything()
    source = corpus.make((args.work / "corpus").resolve())
    warm_up(source)
    bad = 0
    print(
        "| stage | quiet run | kills | ended before | began anew | went on | different | left behind |\n"
        + "|---" * 8
        + "|"
    )
    for stage in STAGES:
        if args.only and stage.name not in args.only:
            continue
        bad += campaign(stage, source, args.work.resolve() / "kill", args)
    return 1 if bad else 0


def campaign(stage: Stage, source: Path, work: Path, args: argparse.Namespace) -> int:
    """Kill one stage at every moment and print its row; returns how often something was wrong."""
    words = stage.line.format(c=source).split()
    quiet, seconds = fresh(work / "quiet"), []
    for _ in range(2):  # the second one knows its kernels
        fresh(quiet)
        done = call(words, quiet)
        if done.code != 0:
            print(f"{stage.name}: the quiet run ended with {done.code}\n{done.text}\n{done.traceback}")
            return 1
        seconds.append(done.seconds)
    expected, tally = contents(quiet), Counter()
    for n in range(args.moments):
        random = Random(f"{args.seed} {stage.name} {n}")
        folder = fresh(work / f"{stage.name.replace(' ', '_')}_{n}")
        wrong: list[str] = []
        for _ in range(args.kills):
            killed = call(words, folder, kill_at_s=random.uniform(0, seconds[-1]))
            tally["kills" if killed.code == -9 else "ended"] += 1
            wrong += [f"left {p}" for p in killed.left]
            tally["kept" if (folder / stage.out).exists() else "anew"] += 1
        done = call(words, folder)
        refused = done.code == 2 and f"{stage.out} exists" in done.text and killed.code == 0
        if done.code != 0 and not refused:
            wrong.append(f"ended with {done.code}: {done.text[-300:]} {done.where}")
        wrong += [f"left {p}" for p in done.left]
        found = contents(folder)
        stray = sorted(name for name in found if ".part" in name or ".old" in name)
        wrong += [f"stray {name}" for name in stray]
        wrong += [f"different: {name}" for name in sorted(expected.keys() | found.keys())
                  if name not in stray and expected.get(name) != found.get(name)]  # fmt: skip
        tally["stray"] += bool(stray) or any(w.startswith("left") for w in wrong)
        tally["different"] += any(w.startswith(("different", "ended")) for w in wrong)
        if wrong:
            print(f"{stage.name}, moment {n}: {'; '.join(wrong[:6])}", flush=True)
        else:
            shutil.rmtree(folder)
    row = (tally[k] for k in ("kills", "ended", "anew", "kept", "different", "stray"))
    print(f"| {stage.name} | {seconds[-1]:.1f} s | {' | '.join(map(str, row))} |", flush=True)
    return tally["different"] + tally["stray"]


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def contents(folder: Path) -> dict[str, str]:
    """Return what every file holds, but for times, by its path."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if not name.endswith(UNLIKE):
            out[name] = hashlib.sha256(timeless(path)).hexdigest()
    return out


def timeless(path: Path) -> bytes:
    """Return a file's bytes; of JSON the values that are no times."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(_timeless(json.loads(data)), sort_keys=True).encode()
    if path.suffix == ".jsonl":
        # A step that was done twice is logged twice: the last time counts.
        steps = {}
        for i, line in enumerate(data.splitlines()):
            try:
                record = _timeless(json.loads(line))
            except ValueError:
                continue
            steps[record.get("step", i), tuple(sorted(record))] = record
        return json.dumps([steps[key] for key in sorted(steps, key=str)], sort_keys=True).encode()
    return data


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not CLOCKS.search(k)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    start = time.monotonic()
    code = main()
    print(f"{time.monotonic() - start:.0f} s")
    raise SystemExit(code)
