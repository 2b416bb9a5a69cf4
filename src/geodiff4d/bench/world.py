"""The open world: people drawn per second, painting them included."""

import multiprocessing
import time
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

import torch

from geodiff4d.world.cameras import random_cameras
from geodiff4d.world.draw import Backend
from geodiff4d.world.expressions import random_expression
from geodiff4d.world.subject import SyntheticSubject

TIMEOUT_SECONDS = 600.0


@dataclass(frozen=True)
class WorldBench:
    """Measures the rendering of open-world people: images, normals and masks, with the painting of their textures."""

    size: int = 256
    subjects: int = 4
    """Number of people per process."""
    images: int = 30
    """Number of images of each."""
    threads: int = 2
    """Number of processes, of one thread each."""

    def run(self) -> dict[str, Any]:
        """Return `images_per_second` over all processes, beside a baseline: the torch renderer on the same people."""
        wall, cpu = _in_parallel(self.threads, self.size, self.subjects, self.images, None)
        total = self.threads * self.subjects * self.images
        few = max(1, self.images // 5)
        slow, _ = _in_parallel(self.threads, self.size, 1, few, "torch")
        # The baseline's subject is paid once for `few` images: scale its share to the same number of images.
        made, _ = _in_parallel(self.threads, self.size, self.subjects, 0, None)
        subject = made / self.subjects
        per_image = max(slow - subject, 1e-6) / few
        return {
            "images_per_second": total / wall,
            "cpu_ms_per_image": 1000 * cpu / total,
            "seconds_per_subject": subject,
            "baseline": {
                "what": "the same with the torch renderer",
                "images_per_second": self.threads * self.images / (subject + per_image * self.images),
            },
        }


def _in_parallel(processes: int, size: int, subjects: int, images: int, backend: Backend | None) -> tuple[float, float]:
    """Return (wall seconds, CPU seconds of all processes) of `_draw_people` in warmed-up processes."""
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(processes + 1), context.SimpleQueue()
    workers = [
        context.Process(target=_draw_people, args=(barrier, queue, k, size, subjects, images, backend), daemon=True)
        for k in range(processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait(TIMEOUT_SECONDS)
    start = time.perf_counter()
    barrier.wait(TIMEOUT_SECONDS)
    wall = time.perf_counter() - start
    cpu = sum(queue.get() for _ in workers)
    for worker in workers:
        worker.join()
    return wall, cpu


def _draw_people(
    barrier: Barrier, queue: Any, process: int, size: int, subjects: int, images: int, backend: Backend | None
) -> None:
    torch.set_num_threads(1)
    _draw_person(10_000 + process, size, 1, backend)
    barrier.wait(TIMEOUT_SECONDS)
    start = time.process_time()
    for s in range(subjects):
        _draw_person(process * subjects + s, size, images, backend)
    queue.put(time.process_time() - start)
    barrier.wait(TIMEOUT_SECONDS)


def _draw_person(seed: int, size: int, images: int, backend: Backend | None) -> None:
    subject = SyntheticSubject(seed, "train")
    assert len(subject.texture)
    if images:
        expr, jaw, eyes = random_expression(seed, images)
        subject.render(
            subject.params(expr, jaw_pose=jaw, eyes_pose=eyes), random_cameras(images, seed, size), backend=backend
        )
