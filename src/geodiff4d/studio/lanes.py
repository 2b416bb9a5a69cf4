"""Two lanes of work: one looks for faces, while somebody waits for it; one makes avatars, one after the other."""

import re
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from geodiff4d.launch.jobs import run_job
from geodiff4d.studio.projects import CANCELLED, Project, Refused, Stage, Store
from geodiff4d.studio.steps import TOUR, Step, StudioConfig, steps_of
from geodiff4d.studio.tour import write_tour

ENVIRONMENT = {"GEODIFF4D_PROGRESS_SECONDS": "1"}
NEXT: dict[Stage, Stage] = {"look": "check", "make": "done"}


class Lane:
    """Carries out the projects of one stage, in the order in which they were asked for, in child processes.

    The children end when this process does, however that ends.
    """

    def __init__(self, store: Store, stage: Stage, config: StudioConfig):
        self.store, self.stage, self.config = store, stage, config
        self.current = ""
        """Name of the project that is worked on."""
        self._stop, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Lane":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self.store.changed:
            self._closed = True
            self._stop.set()
            self.store.changed.notify_all()
        self._thread.join()

    def cancel(self, name: str) -> None:
        """Stop working on a project, if that is what this lane does."""
        with self.store.changed:
            if self.current == name:
                self._stop.set()

    def queued(self) -> list[Project]:
        """Return who waits or is worked on, in order."""
        return sorted((p for p in self.store.all() if p.waiting and p.stage == self.stage), key=lambda p: p.asked)

    def _run(self) -> None:
        while (project := self._next()) is not None:
            began = time.monotonic()
            problem = self._carry_out(project)
            with self.store.changed:
                stopped, self.current = self._stop.is_set(), ""
                if self._closed:
                    return  # the next server goes on with it
                if not stopped:
                    self._note(project.name, problem, time.monotonic() - began)
                elif project.name not in {p.name for p in self.store.all()}:
                    # Deleted while a command wrote into it.
                    shutil.rmtree(self.store.place(project.name), ignore_errors=True)

    def _next(self) -> Project | None:
        """Wait for somebody; None when the lane is closed."""
        with self.store.changed:
            self.store.changed.wait_for(lambda: self._closed or self.queued())
            if self._closed:
                return None
            self._stop.clear()
            project = self.queued()[0]
            self.current = project.name
            return project

    def _carry_out(self, project: Project) -> str:
        """Do what is not done yet; return what went wrong."""
        place = self.store.place(project.name)
        try:
            if project.stage == "make":
                write_tour(place / TOUR)
            for step in steps_of(project, place, self.config):
                if self._stop.is_set():
                    return CANCELLED
                if problem := self._do(step, place):
                    return problem
        except Exception as error:  # whatever it is, the lane goes on with the next
            return f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return ""

    def _do(self, step: Step, place: Path) -> str:
        if not step.keeps and not step.job.done(place):
            shutil.rmtree(place / step.job.name, ignore_errors=True)
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._stop.set()

        timer = threading.Timer(step.limit_s, stop)
        timer.daemon = True
        timer.start()
        try:
            outcome = run_job(step.job, place, ENVIRONMENT, self._stop)
        finally:
            timer.cancel()
        if late.is_set():
            self._stop.clear()
            return f"{step.says}: took longer than {step.limit_s / 60:.0f} minutes and was stopped"
        return spoken(outcome.said, place) if outcome.code else ""

    def _note(self, name: str, problem: str, seconds: float) -> None:
        def noted(project: Project) -> Project:
            if not project.waiting:
                return project
            if problem:
                return replace(project, problem=problem)
            return replace(project, stage=NEXT[project.stage], seconds=project.seconds + seconds)

        with suppress(Refused):  # deleted meanwhile
            self.store.change(name, noted)


def spoken(line: str, place: Path) -> str:
    """Return a command's last line for somebody who knows neither commands nor folders."""
    text = re.sub(r"^geodiff4d \w+: ", "", line)
    text = re.sub(rf"{re.escape(str(place))}/(\S+/)?", "", text)
    return text or "it ended without a word: see the log"
