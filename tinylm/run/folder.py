"""A run is a folder: config, metrics, tokenizer, checkpoints, samples, plot.

`config.json` holds the resolved config and the versions that wrote it. `metrics.jsonl` is one
object a line; a torn last line (a crash while writing) is mended at the next start, and a step that
was logged twice counts by its last line. Checkpoints may lie elsewhere, as on scratch storage
(`checkpoint.dir`); config.json then says where.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from tinylm.core import storage
from tinylm.core.errors import StorageError, UserError, one_line
from tinylm.core.files import replace_text
from tinylm.core.log import say

BUCKET_SECS = 30.0
# Says, in a folder of checkpoints outside of a run's folder, which run it belongs to.
_OWNER = "workdir.txt"


def _holds_steps(folder: epath.Path) -> bool:
    """Say whether there is a checkpoint in a folder."""
    return folder.exists() and any(path.name.isdecimal() for path in folder.iterdir())


class RunFolder:
    """The files of one run, on a disk or in a bucket."""

    def __init__(self, workdir: str):
        """Name the folder; nothing is made before `create`."""
        path = workdir if "://" in workdir else os.path.abspath(os.path.expanduser(workdir))
        storage.check_address("--workdir", workdir)
        if set(path) & set("*?["):
            raise UserError(
                f"--workdir={path} must be free of * ? and [, which file patterns take for other "
                "names."
            )
        self.path = epath.Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self._inside = self.path / "checkpoints"
        self._checkpoints: epath.Path | None = None
        self.tokenizer = self.path / "tokenizer"
        self.samples_file = self.path / "samples.txt"
        self.plot_file = self.path / "loss.png"
        self._mended: dict[epath.Path, bytes] = {}  # and what they hold, in a bucket
        self._unwritten: dict[epath.Path, str] = {}
        self._failing: set[epath.Path] = set()  # said once
        self._sent: dict[epath.Path, float] = {}

    def exists(self) -> bool:
        """Say whether a run was started here."""
        return storage.reach(self.path, "--workdir", self.config_file.exists)

    def check_bucket(self) -> None:
        """Raise UserError or StorageError, one line each, where the folder is in a bucket that
        can't be written.
        """
        if storage.in_bucket(self.path):
            storage.reach(self.path, "--workdir", self._write_and_remove)

    def _write_and_remove(self) -> None:
        trial = self.path / "trial.tmp"
        trial.write_text("", encoding="utf-8")
        trial.unlink()

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of the checkpoints: where config.json says that they are, otherwise within the
        run's.
        """
        if self._checkpoints is not None:
            return self._checkpoints
        try:
            noted = json.loads(self.config_file.read_bytes())["checkpoints"]
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return self._inside
        return epath.Path(noted) if isinstance(noted, str) else self._inside

    @checkpoints.setter
    def checkpoints(self, folder: epath.Path) -> None:
        self._checkpoints = folder

    @property
    def checkpoints_note(self) -> dict[str, str]:
        """What config.json says of checkpoints that lie outside of the run's folder."""
        return (
            {} if self.checkpoints == self._inside else {"checkpoints": os.fspath(self.checkpoints)}
        )

    def place_checkpoints(self, directory: str) -> str:
        """Return the folder for the checkpoints of a run that begins or goes on with
        `checkpoint.dir` as given.

        Below a directory that many runs share, each has a folder of its own, named after its
        workdir. Raises UserError where a run that goes on would find none of its checkpoints and so
        begin at step 0, or where there are another's.
        """
        there = self.checkpoints
        here = self._inside
        if directory:
            absolute = (
                directory if "://" in directory else os.path.abspath(os.path.expanduser(directory))
            )
            mark = hashlib.sha256(os.fspath(self.path).encode()).hexdigest()[:8]
            here = epath.Path(absolute) / f"{self.path.name}-{mark}"
            # A run that was moved goes on with the folder that bears its old name.
            if there.parent == here.parent and not _holds_steps(here):
                here = there
        if not self.exists():
            if directory and _holds_steps(here):
                raise UserError(
                    f"{here} holds checkpoints of a run that was in --workdir={self.path} before; "
                    "remove that folder first, or use another workdir."
                )
        elif here == there:
            self._check_owned(there)
        elif _holds_steps(there) and not _holds_steps(here):
            raise UserError(
                f"the checkpoints of --workdir={self.path} are in {there}; move this folder to "
                f"{here}, or set checkpoint.dir as it was."
            )
        if directory:

            def claim() -> None:
                here.mkdir(parents=True, exist_ok=True)
                (here / _OWNER).write_text(os.fspath(self.path) + "\n", encoding="utf-8")

            try:
                storage.reach(here, "checkpoint.dir", claim)
            except OSError as error:
                raise StorageError(
                    f"checkpoint.dir={directory} can't be written: {one_line(error)}."
                ) from error
        return os.fspath(here)

    def _check_owned(self, folder: epath.Path) -> None:
        """Raise UserError where the checkpoints that lie outside are gone, or are those of a run
        that this copies.
        """
        if folder == self._inside:
            return
        try:
            owner = (folder / _OWNER).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(
                f"the checkpoints of --workdir={self.path} were in {folder}, which is gone or not "
                "mounted; bring it back, or begin in another workdir."
            ) from error
        if owner != os.fspath(self.path) and RunFolder(owner).checkpoints == folder:
            raise UserError(
                f"--workdir={self.path} is a copy of the run in {owner}, which still uses the "
                f"checkpoints in {folder}; copy them to another folder and set checkpoint.dir, or "
                "go on with that run."
            )

    def create(self) -> None:
        """Make the folder; raise StorageError where that is not possible."""
        self._refuse_links()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except storage.failures() as error:
            raise StorageError(
                f"--workdir={self.path} cannot be made: {one_line(error)}."
            ) from error

    def _refuse_links(self) -> None:
        """Raise UserError for a link out of the folder: a run from elsewhere reads and writes
        itself alone.
        """
        if storage.in_bucket(self.path):
            return  # which knows no links
        home = os.path.realpath(self.path)
        for folder in (self.path, self.tokenizer):
            for path in folder.iterdir() if folder.is_dir() else ():
                target = os.path.realpath(path)
                if os.path.islink(os.fspath(path)) and os.path.commonpath([home, target]) != home:
                    remedy = (
                        "set checkpoint.dir"
                        if path == self._inside
                        else "put the file itself there"
                    )
                    raise UserError(
                        f"{path} is a link to {target}, out of the run's folder; {remedy}."
                    )

    def write_config(self, record: dict[str, Any]) -> None:
        """Write config.json whole or not at all."""
        self.write(self.config_file, json.dumps(record, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Read config.json; raise UserError where there is no run, or what the readers name is
        amiss.
        """
        self._refuse_links()
        try:
            content = storage.reach(self.path, "--workdir", self._config_content)
            if content is None:
                raise UserError(
                    f"--workdir={self.path} holds no run (no config.json); train one there first."
                )
            record = json.loads(content)
        except UserError:
            raise
        except OSError as error:
            raise StorageError(f"{self.config_file} cannot be read: {error.strerror}.") from error
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.config_file} is not JSON: {error}; restore it or use another workdir."
            ) from error
        match record:
            case {
                "config": {
                    "seed": int(),
                    "model": {},
                    "optimizer": {},
                    "train": {"accumulation_steps": int()},
                    "data": {"batch_size": int(), "seq_len": int(), "tokenizer": str()},
                    "sample": {"prompts": [*_]},
                },
                "versions": {"mesh": {}},
            }:
                ends = record.get("end_ids", [])
                end_ids_are_whole = isinstance(ends, list) and all(
                    isinstance(end, int) for end in ends
                )
                end_ids_are_whole = end_ids_are_whole and isinstance(
                    record.get("checkpoints", ""), str
                )
                stores_are_named = isinstance(record.get("token_stores", {}), dict)
                if (
                    end_ids_are_whole
                    and stores_are_named
                    and isinstance(record.get("start_id", 0), int)
                ):
                    return record
        raise UserError(
            f"{self.config_file} lacks what a run's has; restore it or use another workdir."
        )

    def _config_content(self) -> bytes | None:
        try:
            return self.config_file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: epath.Path, text: str) -> None:
        """Replace a small file in one step."""
        try:
            replace_text(path, text)
        except storage.failures() as error:
            raise StorageError(f"{path} cannot be written: {one_line(error)}.") from error

    def append(self, path: epath.Path, text: str, now: bool = False) -> None:
        """Add text to the end of a log; the first time, cut off the torn line that an earlier
        process may have left.

        What can't be written is kept, and written with the next that can. In a bucket an object
        can't grow and is written anew, so it takes what came in BUCKET_SECS at once, unless it has
        to be written `now`.
        """
        self._unwritten[path] = self._unwritten.get(path, "") + text
        in_bucket = storage.in_bucket(path)
        if (
            in_bucket
            and not now
            and time.monotonic() - self._sent.get(path, -math.inf) < BUCKET_SECS
        ):
            return
        self._sent[path] = time.monotonic()
        try:
            new = self._unwritten[path].encode()
            if path not in self._mended:
                old = path.read_bytes() if path.exists() else b""
                self._mended[path] = old[: old.rfind(b"\n") + 1]
                if self._mended[path] != old and not in_bucket:
                    os.truncate(path, len(self._mended[path]))
            if in_bucket:
                self._mended[path] += new
                path.write_bytes(self._mended[path])
            else:
                self._mended[path] = b""
                with path.open("ab") as file:
                    file.write(new)
            del self._unwritten[path]
            self._failing.discard(path)
        except storage.failures() as error:
            self._mended.pop(path, None)  # a part of it may be there
            if path not in self._failing:
                self._failing.add(path)
                say(
                    f"warning: {path} cannot be written: {one_line(error)}; its lines are kept "
                    "until it can."
                )

    def flush(self) -> None:
        """Write what could not be written before; raise StorageError where it still can't."""
        for path in list(self._unwritten):
            self.append(path, "", now=True)
        for path in self._unwritten:
            raise StorageError(
                f"{path} cannot be written, its last lines are lost; free space there."
            )

    def log(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; what is not finite, which JSON can't hold, becomes
        null.
        """
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                record = {**record, name: None}
        self.append(
            self.metrics_file, json.dumps(record) + "\n", now=record.get("split") == "time"
        )  # with a save

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl in order of steps, the last of each (step, split),
        without torn ones.
        """
        found = {(line["step"], line["split"]): line for line in self.lines()}
        return [found[key] for key in sorted(found)]

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl, their split and their numbers, without torn ones and
        what else is none.
        """
        if not self.metrics_file.exists():
            return
        for text in self.metrics_file.read_bytes().splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            match line:
                case {"step": int(), "split": str(split)}:
                    numbers = {
                        name: x
                        for name, x in line.items()
                        if isinstance(x, int | float) and abs(x) < 1e300
                    }
                    yield {**numbers, "split": split}
