"""Carry out many commands: thousands of avatars, tracks, imports or evaluations, on this machine or a Ray cluster."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Args:
    """Options of `geodiff4d fleet`."""

    jobs: Annotated[Path, tyro.conf.Positional]
    """Text file with one JSON object a line, a `name` and what to `run`:
    {"name": "anna", "run": "reconstruct anna.jpg talk.mp4 --out {out}"}. {out} is the job's own folder OUT/anna/out."""
    out: Path
    """Folder of the fleet: one folder per job with its log, `fleet.jsonl` with every attempt, `failed.json` with what
    failed and why. The same command goes on: jobs that are done are not done again."""
    workers: int | None = None
    """Jobs at a time on this machine, by default one per GPU, or one per core where there is none."""
    ray: str | None = None
    """Address of a Ray cluster to use instead ("auto" on one of its machines), whose machines see OUT under the same
    name."""
    patience: float = 10.0
    """How long the fleet waits for a Ray cluster whose head was lost [minutes]."""
    cores: int = 1
    """Cores that a job takes on a Ray cluster; where the cluster has GPUs, a job takes one too."""
    retries: int = 2
    """Further attempts at a job that failed, unless its input is wrong."""


def run(args: Args) -> None:
    from geodiff4d.cli import COMMANDS, ENDLESS
    from geodiff4d.cli.progress import bar
    from geodiff4d.core.errors import UserError
    from geodiff4d.launch.fleet import LocalCrew, run_fleet
    from geodiff4d.launch.jobs import read_jobs
    from geodiff4d.launch.ray_cluster import RayCrew

    for name, value, least in (("workers", args.workers, 1), ("cores", args.cores, 1), ("retries", args.retries, 0)):
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}: expected at least {least}")
    if args.ray is not None and args.workers is not None:
        raise UserError("--workers is for this machine alone: leave it out, or leave --ray out")
    if not 0 <= args.patience < float("inf"):
        raise UserError(f"--patience is {args.patience}: expected minutes, 0 or more")
    jobs = read_jobs(args.jobs, [name for name in COMMANDS if name not in ("fleet", *ENDLESS)])
    out = args.out.resolve()
    if args.ray is None:
        crew = LocalCrew(out, args.workers)
    else:
        crew = RayCrew(out, args.ray, args.cores, 60 * args.patience, partial(print, "note:", file=sys.stderr))
    try:
        tally = run_fleet(jobs, out, crew, args.retries, bar)
    finally:
        crew.close()
    earlier = f" ({tally.skipped} of them before)" if tally.skipped else ""
    print(f"{args.out}: {tally.done} of {len(jobs)} jobs done{earlier}")
    if tally.failed:
        name, first = next(iter(tally.failed.items()))
        raise UserError(
            f"{len(tally.failed)} of {len(jobs)} jobs failed, {name} first ({first['said']}): {out / 'failed.json'} "
            "has all of them; the same command tries them again"
        )
