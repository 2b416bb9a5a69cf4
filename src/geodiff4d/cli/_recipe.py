"""`geodiff4d train all`: carry out a recipe, from nothing to the weights that ship."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from geodiff4d.cli._training_args import Args
from geodiff4d.core.errors import UserError
from geodiff4d.core.rundir import alone
from geodiff4d.core.stopping import Stopped, stop_requests
from geodiff4d.launch.jobs import Outcome, run_job
from geodiff4d.launch.recipe import RECIPES, RecipeRun, Stage, lasting, plan_lines, read_recipe, write_figures

SAY_SECONDS = 60.0
"""Time between two lines of a stage's log that are repeated [s]."""


def run_all(args: Args, commands: list[str]) -> None:
    """Print the plan and carry it out; finished stages are kept, unfinished ones go on.

    Raises:
        UserError: there is no such recipe, or a stage failed.
        Stopped: this process was told to.
    """
    path = args.recipe or RECIPES / f"{args.preset}.toml"
    if args.recipe is None and not path.exists():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.toml")))
        raise UserError(f"--preset {args.preset} has no recipe: expected {known}, or --recipe FILE")
    if args.photographs is not None and not args.photographs.is_dir():
        raise UserError(f"--photographs {args.photographs} is not a folder")
    recipe = read_recipe(path, commands)
    photographs = None if args.photographs is None else args.photographs.resolve()
    run = RecipeRun(recipe, args.out.resolve(), photographs, args.workers, args.seed)
    print("\n".join(plan_lines(run)), flush=True)
    if photographs is None and any(s.photographs for s in recipe.stages):
        print("no --photographs: every stage sees rendered people alone")
    if args.dry_run:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with alone(args.out):
        for stage in recipe.stages:
            if run.done(stage) is None:
                _carry_out(run, stage)
        result = write_figures(run)
    print((args.out / "figures.md").read_text())
    print(f"{args.out / 'weights'}: {result['megabytes']:.1f} MB, for GEODIFF4D_WEIGHTS or in src/geodiff4d/assets")


def _carry_out(run: RecipeRun, stage: Stage) -> None:
    log = run.out / stage.name / "log.txt"
    print(f"{stage.name}: {stage.makes}, about {lasting(stage.hours)}; log {log}", flush=True)
    stop = threading.Event()
    with stop_requests() as request, ThreadPoolExecutor(1) as pool:
        job = pool.submit(run_job, run.job(stage), run.out, run.environment(), stop)
        try:
            _watch(job, log, lambda: request.asked)
        finally:
            # An interrupt too: the stage writes its checkpoint before this ends.
            stop.set()
        outcome: Outcome = job.result()
    if outcome.code and request.asked:
        raise Stopped(f"stage {stage.name} was told to stop: the same command goes on from its last checkpoint")
    if outcome.code:
        raise UserError(
            f"stage {stage.name} failed ({outcome.said or f'exit code {outcome.code}'}): mend that and give the same "
            f"command again, which goes on there; {log} has all of it"
        )
    run.finish(stage, outcome)
    print(f"{stage.name}: done in {lasting(outcome.seconds / 3600)}", flush=True)
    if request.asked:
        raise Stopped(f"told to stop after stage {stage.name}: the same command goes on with the next one")


def _watch(job: "Future[Outcome]", log: Path, asked: Callable[[], bool]) -> None:
    """Wait for a stage's end or until somebody asks to stop, and repeat the last line of its log now and then."""
    said, shown = time.monotonic(), ""
    while not wait([job], timeout=0.5).done and not asked():
        if time.monotonic() - said > SAY_SECONDS:
            lines = log.read_text(errors="replace").splitlines() if log.exists() else []
            if lines and lines[-1] != shown:
                shown = lines[-1]
                print(f"  {shown[:160]}", flush=True)
            said = time.monotonic()
