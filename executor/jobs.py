"""The folders of the jobs that an executor works for: their code, and each site's own place."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..serialization.archive import unpack_archive
from ..serialization.errors import JobError
from ..serialization.jobspec import JobSpec
from ..serialization.messages import PayloadRef

_ARCHIVE = ".archive"


@dataclass(frozen=True, slots=True)
class JobFolder:
    """A job's code on this machine."""

    spec: JobSpec
    folder: Path

    def custom(self, site: str) -> Path:
        """The job's own modules for this site."""
        return self.spec.custom_dir(self.folder, site)

    def script(self, name: str, site: str) -> Path:
        """A script of the job for this site, or an absolute path that the site has.

        Raises:
            JobError: it is not there.
        """
        path = Path(name) if Path(name).is_absolute() else self.custom(site) / name
        if not path.is_file():
            raise JobError(f"the script {name!r} is not at {path}: put it beside the job, or name a file the site has")
        return path


class JobFolders:
    """``<workspace>/jobs/<job>/``: unpacked once; `ensure` may be called from several threads."""

    def __init__(self, workspace: Path) -> None:
        self._workspace = workspace
        self._known: dict[str, JobFolder] = {}
        self._logging: dict[str, str] = {}  # the folder for the logs of each job, where it was made
        self._locks: dict[str, threading.Lock] = {}
        self._sites: dict[str, str] = {}  # where the sites' folders of each job are
        self._lock = threading.Lock()

    def folder(self, job: str) -> Path:
        """Where everything of a job lies.

        Raises:
            JobError: the id is not a file name.
        """
        if not job or "/" in job or "\\" in job or job.startswith(".") or not job.isprintable():
            raise JobError(f"job id {job!r} cannot name a folder")
        return self._workspace / "jobs" / job

    def site_folder(self, job: str, site: str) -> Path:
        """The site's own place for this job: the working directory of its code."""
        path = Path(self.site_place(job, site))
        path.mkdir(parents=True, exist_ok=True)
        return path

    def site_place(self, job: str, site: str) -> str:
        """Where `site_folder` is, or will be."""
        root = self._sites.get(job)
        if root is None:
            root = self._sites[job] = str(self.folder(job) / "sites")
        return f"{root}/{site}"

    def log_path(self, job: str, name: str) -> str:
        """A site's log for this job."""
        folder = self._logging.get(job)
        if folder is None:
            place = self._workspace / "logs" / job
            place.mkdir(parents=True, exist_ok=True)
            folder = self._logging[job] = str(place)
        return f"{folder}/{name}.log"

    def ensure(self, job: str, archive: PayloadRef, fetch: Callable[[PayloadRef], Path | bytes]) -> JobFolder:
        """The job's folder, fetched and unpacked if it is not here.

        Raises:
            JobError: the archive, or the job in it, is wrong. Whatever ``fetch`` raises.
        """
        with self._lock:
            if (known := self._known.get(job)) is not None:
                return known
            lock = self._locks.setdefault(job, threading.Lock())
        with lock:
            if (known := self._known.get(job)) is not None:
                return known
            folder = self.folder(job)
            code = folder / "code"
            mark = folder / _ARCHIVE
            if not code.is_dir() or not mark.is_file() or mark.read_text() != archive.id:
                data = fetch(archive)
                fresh = folder / "code.part"
                shutil.rmtree(fresh, ignore_errors=True)
                unpack_archive(data, fresh)
                shutil.rmtree(code, ignore_errors=True)
                fresh.rename(code)
                mark.write_text(archive.id)
            found = JobFolder(JobSpec.load(code), code)
            with self._lock:
                self._known[job] = found
            return found

    def forget(self, job: str) -> None:
        """The job is over: its code goes; logs and what its code wrote in the sites' folders stay."""
        with self._lock:
            self._known.pop(job, None)
            self._locks.pop(job, None)
            self._sites.pop(job, None)
        self._logging.pop(job, None)
        folder = self.folder(job)
        (folder / _ARCHIVE).unlink(missing_ok=True)
        shutil.rmtree(folder / "code", ignore_errors=True)
        shutil.rmtree(folder / "code.part", ignore_errors=True)

    def sweep(self, job: str, stopping: Callable[[], bool]) -> None:
        """Remove what is empty of a job's folder. Of thousands of sites that takes a while: in any thread."""
        folder = self.folder(job)
        with contextlib.suppress(OSError), os.scandir(folder / "sites") as entries:
            for entry in entries:
                if stopping():
                    return
                with contextlib.suppress(OSError):
                    os.rmdir(entry.path)  # noqa: PTH106 - a Path for each of thousands costs more than the call
        for place in (folder / "sites", folder):
            with contextlib.suppress(OSError):
                place.rmdir()

    def on_disk(self) -> list[str]:
        """The jobs whose code is here."""
        return [path.name for path in _folders(self._workspace / "jobs") if (path / "code").is_dir()]

    def prune_logs(self, keep: int) -> None:
        """Remove the logs of all jobs but those that go on and the ``keep`` that were written to last."""
        with self._lock:
            known = set(self._known)
        found = [path for path in _folders(self._workspace / "logs") if path.name not in known]
        if len(found) <= keep:
            return
        found.sort(key=lambda path: max((file.stat().st_mtime for file in path.iterdir()), default=0.0))
        for path in found[: len(found) - keep]:
            shutil.rmtree(path, ignore_errors=True)


def _folders(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return []
