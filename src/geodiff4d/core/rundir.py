"""A training run on disk: configuration, JSONL log, and the checkpoint that a repeated command resumes from."""

import fcntl
import json
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from geodiff4d.core.errors import UserError
from geodiff4d.core.files import fresh_file, read_object, remove, save_tensors, write_json
from geodiff4d.core.jsontext import parse_json

OnRecord = Callable[[dict[str, Any]], None]
"""Told every record of a run as it is logged: its `step`, and whatever was measured there."""
_HELD: dict[Path, int] = {}
"""Locks of this process, which last as long as it does."""


class RunFolder:
    """`config.json`, `log.jsonl`, `checkpoint.safetensors` and those before it: `checkpoint-previous.safetensors`,
    `checkpoint-previous-2.safetensors` and so on, as many as are to be kept.

    Options named in `free` may change from call to call. Of the processes of one run, one `writes`: it keeps other runs
    out of the folder for as long as it lives. `keep` is how many checkpoints stay.

    Raises:
        UserError: the folder holds a run of another configuration, or another process writes to it.
    """

    def __init__(
        self, path: Path, config: Any, free: frozenset[str] = frozenset(), writes: bool = True,
        on_record: OnRecord = lambda record: None, keep: int = 2,
    ):  # fmt: skip
        self.path, self.on_record, self.keep = Path(path), on_record, keep
        self._writer: threading.Thread | None = None
        self._failed: BaseException | None = None
        self.path.mkdir(parents=True, exist_ok=True)
        if writes:
            lock_folder(self.path)
            for left in self.path.glob(".*.part"):
                remove(left)
        ours = json.loads(json.dumps(asdict(config), default=str))
        known = self.path / "config.json"
        if known.exists() and not _same(read_object(known, "config")["config"], ours, free):
            raise UserError(
                f"{path} holds a run of another configuration: give --out a new folder, or remove it to start over"
            )
        if writes and known.exists() and read_object(known, "config")["config"] != ours:
            write_json(known, {**read_object(known, "config"), "config": ours})
        if not known.exists():
            write_json(known, {"config": ours, "commit": _git("rev-parse", "HEAD"), "torch": torch.__version__})
            (self.path / "diff.patch").write_text(_git("diff", "HEAD") or "")
        self.started = time.monotonic()

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to `log.jsonl`, and tell it."""
        with (self.path / "log.jsonl").open("ab+") as file:
            # A killed process may have left half a line.
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                file.write(b"\n")
            file.write((json.dumps({"seconds": round(time.monotonic() - self.started, 2), **record}) + "\n").encode())
        self.on_record(record)

    def save(self, tensors: dict[str, Tensor], step: int) -> None:
        """Write the newest checkpoint, and keep those before it."""
        self.save_later(tensors.items(), step)
        self.settle()

    def save_later(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        step: int,
        then: Callable[[dict[str, Tensor]], None] = lambda copies: None,
    ) -> None:
        """Copy the tensors to the CPU, one by one, and write them beside what goes on; `then` is handed the copies.

        One checkpoint is written at a time. What went wrong is raised by the next call, or by `settle`.
        """
        self.settle()
        # Copies, because what goes on changes them, and because safetensors refuses tensors that share memory.
        copies = {k: v.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for k, v in tensors}

        def write() -> None:
            try:
                self._write(copies, step)
                then(copies)
            except BaseException as error:
                self._failed = error

        self._writer = threading.Thread(target=write)
        self._writer.start()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is whole, and raise what kept it from that."""
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Leave no checkpoint half written, whatever ends the block."""
        try:
            yield
        finally:
            self.settle()

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Take a checkpoint's tensors over within the block.

        Raises:
            UserError: they do not fit the run: the file was changed, or is another run's.
        """
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"the checkpoint in {self.path} does not fit this run ({reason}): remove the folder to start over"
            ) from None

    def _write(self, tensors: dict[str, Tensor], step: int) -> None:
        names = [self._name(i) for i in range(self.keep)]
        with fresh_file(names[0]) as temporary:
            save_tensors(tensors, temporary, {"step": str(step)})
            for older, newer in zip(reversed(names[1:]), reversed(names[:-1]), strict=True):
                if newer.exists():
                    os.replace(newer, older)

    def _name(self, age: int) -> Path:
        return self.path / ("checkpoint" + ("", "-previous", f"-previous-{age}")[min(age, 2)] + ".safetensors")

    def load(self, warn: Callable[[str], None] = lambda line: None) -> tuple[dict[str, Tensor], int] | None:
        """Return (tensors, step) of the newest checkpoint that can be read, or None before the first.

        A damaged one is passed over for the one before it, and `warn` is told.

        Raises:
            UserError: there are checkpoints and none can be read.
        """
        ages = range(2 + len(list(self.path.glob("checkpoint-previous-*"))))
        paths = [p for age in ages if (p := self._name(age)).exists()]
        for path in paths:
            try:
                with safe_open(path, "pt") as file:
                    step = int((file.metadata() or {})["step"])
                return load_file(path), step
            except (SafetensorError, KeyError, ValueError) as error:
                warn(f"{path} is damaged ({error}): going back to the checkpoint before it")
        if paths:
            raise UserError(f"no checkpoint in {self.path} can be read: remove the folder to start over")
        return None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a run's JSONL, if there is one; lines that an interruption cut short are passed over."""
    records = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other processes from the block for as long as it takes, by a lock on the folder itself.

    Raises:
        UserError: another one is in it.
    """
    lock = _locked(os.open(folder, os.O_RDONLY), folder)
    try:
        yield
    finally:
        os.close(lock)


def lock_folder(folder: Path) -> None:
    """Keep other processes out of a folder until this one ends, by a file `.lock` in it.

    Raises:
        UserError: another one is in it.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    held, path = _HELD.get(folder), folder / ".lock"
    if held is not None and path.exists() and os.path.samestat(os.fstat(held), path.stat()):
        return
    lock = _locked(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), folder)
    if held is not None:
        os.close(held)  # Of a folder that was removed since.
    _HELD[folder] = lock


def _locked(lock: int, folder: Path) -> int:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"another process is writing to {folder}: wait for it, or name a new folder") from None
    except OSError:
        pass  # Some network file systems have no locks.
    return lock


def _same(saved: Any, ours: Any, free: frozenset[str]) -> bool:
    """Compare configurations; options that are free, or did not exist yet when the run began, are not compared."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        return saved.keys() <= ours.keys() and all(k in free or _same(v, ours[k], free) for k, v in saved.items())
    return saved == ours


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Flatten an optimiser's state into named tensors."""
    state = optimiser.state_dict()["state"]
    return {f"optimiser.{i}.{k}": torch.as_tensor(v) for i, values in state.items() for k, v in values.items()}


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the state of `optimiser_tensors` back."""
    whole = optimiser.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimiser."):
            _, index, key = name.split(".", 2)
            whole["state"].setdefault(int(index), {})[key] = value
    optimiser.load_state_dict(whole)
    # Moments lie in memory as their weights do: fused kernels pair them by address, and files know no channels-last.
    for parameter, state in optimiser.state.items():
        for key, value in state.items():
            if value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _git(*arguments: str) -> str | None:
    """Return what git says about the source's folder; None outside a checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
