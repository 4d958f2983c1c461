"""A run is a folder: config, metrics, tokenizer, checkpoints, samples, plot.

`config.json` holds the resolved config and the versions that wrote it. `metrics.jsonl` is one
object a line; a torn last line (from a crash while writing) is cut off at the next start, and where
a step was logged twice, its last line counts. Checkpoints may lie elsewhere, as on scratch storage
(`checkpoint.dir`); config.json then says where.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from tinylm.core import storage
from tinylm.core.errors import StorageError, UserError
from tinylm.core.files import make_folder, replace_text
from tinylm.core.vitals import ON
from tinylm.run import orbax_s3
from tinylm.run.log_files import LogFile, LogObject, open_log

# Says, in a folder of checkpoints outside of a run's folder, which run it belongs to.
_OWNER = "workdir.txt"


def _absolute(path: str) -> str:
    """Return the absolute form of a path; the address of a bucket stays as it is."""
    if "://" in path:
        return path
    return os.path.abspath(os.path.expanduser(path))


def _holds_steps(folder: epath.Path) -> bool:
    """Say whether there is a checkpoint in a folder."""
    return folder.exists() and any(path.name.isdecimal() for path in folder.iterdir())


class RunFolder:
    """The files of one run, on a disk or in a bucket."""

    def __init__(self, workdir: str, setting: str = "--workdir"):
        """Name the folder; nothing is made before `create`.

        Args:
          workdir: a path, or an address in a bucket.
          setting: the flag or setting that names it, for messages.
        """
        self._setting = setting
        storage.check_address(setting, workdir)
        path = _absolute(workdir)
        if set(path) & set("*?["):
            raise UserError(
                f"{setting}={path} must be free of * ? and [, which file patterns take for other "
                "names."
            )
        self.path = epath.Path(path)
        self.config_file = self.path / "config.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tokenizer = self.path / "tokenizer"
        self.samples_file = self.path / "samples.txt"
        self.plot_file = self.path / "loss.png"
        self._inside = self.path / "checkpoints"
        self._checkpoints: epath.Path | None = None
        self._logs: dict[epath.Path, LogFile | LogObject] = {}

    def exists(self) -> bool:
        """Say whether a run was started here."""
        return storage.reach(self.path, self._setting, self.config_file.exists)

    def check_bucket(self) -> None:
        """Raise UserError or StorageError where the folder is in a bucket that can't be written."""
        if storage.in_bucket(self.path):
            storage.reach(self.path, "--workdir", self._write_and_remove)

    def check_checkpoint_dir(self, directory: str) -> None:
        """Raise UserError where the checkpoints would go to a kind of bucket that Orbax lacks.

        Otherwise it would fail at the first save.

        Args:
          directory: checkpoint.dir; empty for the folder of the run.
        """
        setting = "checkpoint.dir" if directory else "--workdir"
        place = directory or os.fspath(self.path)
        scheme = place.partition("://")[0] if storage.in_bucket(place) else ""
        if scheme == "s3":
            storage.reach(place, setting, orbax_s3.enable)
        elif scheme not in ("", "gs"):
            raise UserError(
                f"{setting}={place}: checkpoints can't be written there, since Orbax knows gs:// "
                "and s3:// alone; set checkpoint.dir to such a bucket, or to a disk that all hosts "
                "share."
            )

    def _write_and_remove(self) -> None:
        trial = self.path / "trial.tmp"
        trial.write_text("", encoding="utf-8")
        trial.unlink()

    @property
    def checkpoints(self) -> epath.Path:
        """The folder of the checkpoints: the one that config.json names, or one in the run's."""
        if self._checkpoints is not None:
            return self._checkpoints
        try:
            content = storage.reach(self.path, self._setting, self._config_content)
        except OSError:
            # A bucket that can't be reached is another kind of error, and no answer.
            return self._inside
        try:
            noted = json.loads(content or b"")["checkpoints"]
        except (ValueError, LookupError, TypeError, RecursionError):
            return self._inside
        if not isinstance(noted, str):
            return self._inside
        return epath.Path(noted)

    @checkpoints.setter
    def checkpoints(self, folder: epath.Path) -> None:
        self._checkpoints = folder

    @property
    def checkpoints_note(self) -> dict[str, str]:
        """What config.json says of checkpoints that lie outside of the run's folder."""
        if self.checkpoints == self._inside:
            return {}
        return {"checkpoints": os.fspath(self.checkpoints)}

    def place_checkpoints(self, directory: str) -> str:
        """Return the folder for the checkpoints of a run that begins or goes on.

        Below a directory that many runs share, each has a folder of its own, named after its
        workdir.

        Args:
          directory: `checkpoint.dir` as given; "" for the run's own folder.

        Raises:
          UserError: where a run that goes on would find none of its checkpoints, and so begin at
            step 0, or would take those of another run.
          StorageError: where the directory can't be written.
        """
        there = self.checkpoints
        here = self._inside
        if directory:
            mark = hashlib.sha256(os.fspath(self.path).encode()).hexdigest()[:8]
            here = epath.Path(_absolute(directory)) / f"{self.path.name}-{mark}"
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
            try:
                storage.reach(here, "checkpoint.dir", lambda: self._claim(here))
            except OSError as error:
                raise StorageError(
                    f"checkpoint.dir={directory} can't be written: {storage.in_words(error)}."
                ) from error
        return os.fspath(here)

    def _claim(self, folder: epath.Path) -> None:
        """Make a folder of checkpoints, and write into it that it is this run's."""
        make_folder(folder)
        (folder / _OWNER).write_text(os.fspath(self.path) + "\n", encoding="utf-8")

    def _check_owned(self, folder: epath.Path) -> None:
        """Raise UserError where checkpoints that lie outside are gone, or another run's.

        They are another's where this run's folder is a copy, and the original still uses them.
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
            make_folder(self.path)
        except storage.failures() as error:
            raise StorageError(
                f"--workdir={self.path} cannot be made: {storage.in_words(error)}."
            ) from error

    def _refuse_links(self) -> None:
        """Raise UserError for a link out of the folder.

        A run may come from elsewhere, and must not read or write anything here but itself.
        """
        # A bucket knows no links.
        if storage.in_bucket(self.path):
            return
        home = os.path.realpath(self.path)
        for folder in (self.path, self.tokenizer):
            if not folder.is_dir():
                continue
            for path in folder.iterdir():
                target = os.path.realpath(path)
                is_link = os.path.islink(os.fspath(path))
                if not is_link or os.path.commonpath([home, target]) == home:
                    continue
                remedy = "put the file itself there"
                if path == self._inside:
                    remedy = "set checkpoint.dir"
                raise UserError(f"{path} is a link to {target}, out of the run's folder; {remedy}.")

    def write_config(self, record: dict[str, Any]) -> None:
        """Write config.json whole or not at all."""
        self.write(self.config_file, json.dumps(record, indent=2) + "\n")

    def read_config(self) -> dict[str, Any]:
        """Read config.json.

        Raises:
          UserError: where there is no run, or config.json lacks what is read of it.
          StorageError: where the file can't be read.
        """
        self._refuse_links()
        try:
            content = storage.reach(self.path, self._setting, self._config_content)
            if content is None:
                raise UserError(
                    f"{self._setting}={self.path} holds no run (no config.json); train one there "
                    "first."
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
        if not _describes_run(record):
            raise UserError(
                f"{self.config_file} lacks what a run's has; restore it or use another workdir."
            )
        return record

    def _config_content(self) -> bytes | None:
        """Return the bytes of config.json, or None where there is none."""
        try:
            return self.config_file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def write(self, path: epath.Path, text: str) -> None:
        """Replace a small file in one step."""
        try:
            replace_text(path, text)
        except storage.failures() as error:
            raise StorageError(f"{path} cannot be written: {storage.in_words(error)}.") from error

    def append(self, path: epath.Path, text: str, now: bool = False) -> None:
        """Add text to the end of a log.

        Args:
          path: of the log.
          text: whole lines.
          now: whether a log in a bucket has to be written at once. Otherwise lines may wait for
            others to come.
        """
        if path not in self._logs:
            self._logs[path] = open_log(path)
        self._logs[path].append(text, now)

    def send_logs(self) -> None:
        """Have the lines of logs in a bucket that wait for others written now, by a thread."""
        for log in self._logs.values():
            log.append("", now=True)

    def wait_for_logs(self, secs: float | None = None) -> None:
        """Wait until the lines that were sent are written, or were refused; at most so long."""
        for log in self._logs.values():
            log.wait(secs)

    def flush(self, outage_secs: float = 0.0) -> None:
        """Write what could not be written before; raise StorageError where it still can't.

        Args:
          outage_secs: how long to try where a bucket fails.
        """
        for log in self._logs.values():
            log.flush(outage_secs)

    def log(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl.

        A number that is not finite, which JSON can't hold, becomes null.
        """
        line = {}
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                value = None
            line[name] = value
        # The record of times comes with each save, and lines up to a save must not be lost.
        is_with_save = record.get("split") == "time"
        self.append(self.metrics_file, json.dumps(line) + "\n", now=is_with_save)

    def read_log(self, path: epath.Path) -> bytes:
        """Return what a log holds; nothing where there is none.

        Raises:
          StorageError: its bucket can't be reached.
        """
        with storage.waited_for(path), storage.explaining(path, self._setting):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return b""

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl in order of steps, the last of each (step, split)."""
        found = {(line["step"], line["split"]): line for line in self.lines()}
        return [found[key] for key in sorted(found)]

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the lines of metrics.jsonl, each with its split, its numbers, and on which hosts
        the largest of them were.

        A line that is torn, or that no run wrote, is passed over.
        """
        for text in self.read_log(self.metrics_file).splitlines():
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            match line:
                case {"step": int(step), "split": str(split)} if _is_kept("step", step):
                    kept = {name: value for name, value in line.items() if _is_kept(name, value)}
                    yield {**kept, "split": split}


def _is_kept(name: str, value: Any) -> bool:
    """Say whether a value of a line is a number, or the name of a host where one belongs."""
    if isinstance(value, int | float):
        # JSON may hold numbers that are larger than a float.
        return abs(value) < 1e300
    return isinstance(value, str) and name.endswith(ON)


def _describes_run(record: Any) -> bool:
    """Say whether the content of a config.json has what is read of it without further checks."""
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
            pass
        case _:
            return False
    end_ids = record.get("end_ids", [])
    if not isinstance(end_ids, list) or not all(isinstance(end_id, int) for end_id in end_ids):
        return False
    return (
        isinstance(record.get("checkpoints", ""), str)
        and isinstance(record.get("token_stores", {}), dict)
        and isinstance(record.get("start_id", 0), int)
    )
