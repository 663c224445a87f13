"""A run as a job on a cluster: handed over, followed, asked after, stopped."""

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from onelabel.cluster import runtime
from onelabel.configs.load import absolute, dump
from onelabel.configs.passwords import without_password
from onelabel.configs.schema import RunConfig
from onelabel.errors import ClusterError

# Ray tells of each step, and sets these levels itself when it is imported.
for _chatty in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)

_RECORD = "run.yaml"
_COMMAND = "python -m onelabel.orchestrator"
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_LOCAL = "http://127.0.0.1:8265"
_LOOK_S = 1
_PATIENCE_S = 60
_LOST = (OSError, RuntimeError, aiohttp.ClientError)


class Jobs:
    """The jobs of a cluster.

    Parameters
    ----------
    address : URL of the head's dashboard, such as http://HEAD:8265; None: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or that
        of a head on this machine

    Raises
    ------
    ClusterError : by any method, where the cluster does not answer, refuses the token or holds no such job.
    """

    def __init__(self, address: str | None = None, /) -> None:
        named = next(filter(None, (address, *map(os.environ.get, _ADDRESSES))), _LOCAL)
        if not named.startswith(("http://", "https://")):
            raise ClusterError(
                f"cluster address '{without_password(named)}' is no URL: give --address, such as http://HEAD:8265"
            )
        self._name = f"cluster '{without_password(named)}'"
        os.environ[_ADDRESSES[0]] = named  # what Ray heeds before all else
        with self._answering():
            self._client = JobSubmissionClient(headers=_credentials())

    def submit(self, config: RunConfig, /) -> str:
        """Hand a run, or a search, over with this code; the job's id."""
        with TemporaryDirectory() as scratch, self._answering():
            folder = Path(scratch) / "job"
            folder.mkdir()
            dump(for_job(config), folder / _RECORD)
            command = f"{_COMMAND} {'search' if config.search else 'run'} {_RECORD}"
            environment = {"working_dir": str(folder), "py_modules": [str(runtime.package(Path(scratch)))]}
            return self._client.submit_job(entrypoint=command, runtime_env=environment, metadata={"name": config.name})

    def follow(self, job: str, write: Callable[[str], None], /) -> JobDetails:
        """Write a job's log from its beginning until the job ends; a connection that breaks is made again."""
        written = 0

        async def tail() -> None:
            nonlocal written
            seen = 0
            async for text in self._client.tail_job_logs(job):
                write(text[max(0, written - seen) :])
                seen += len(text)
                written = max(written, seen)

        lost: float | None = None  # since when
        while True:
            try:
                found = self._client.get_job_info(job)  # before the log: if it has ended, that is all of it
                if not found.status.is_terminal():
                    lost = None
                asyncio.run(tail())
                if found.status.is_terminal():
                    return found
            except _LOST as error:
                lost = lost or time.monotonic()
                if time.monotonic() - lost > _PATIENCE_S:
                    raise ClusterError(
                        f"{self._name} does not answer any more ({_reason(error)}); job {job} may go on"
                    ) from error
            time.sleep(_LOOK_S)

    def details(self, job: str, /) -> JobDetails:
        """How a job is."""
        with self._answering():
            return self._client.get_job_info(job)

    def stop(self, job: str, /) -> JobDetails:
        """Stop a job, and wait until it has ended; one that has ended stays as it is."""
        with self._answering():
            self._client.stop_job(job)
            while not (found := self._client.get_job_info(job)).status.is_terminal():
                time.sleep(_LOOK_S)
            return found

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Say in one sentence what is wrong."""
        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(f"{self._name} refuses the token; {runtime.TOKEN}") from error
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{self._name} cannot be reached ({_reason(error)}): check --address, such as http://HEAD:8265, and"
                " that Ray runs there with its dashboard"
            ) from error
        except RuntimeError as error:
            raise ClusterError(f"{self._name} refuses: {_reason(error)}") from error


def for_job(config: RunConfig, /) -> RunConfig:
    """The same run from any folder of the cluster: paths are absolute, and it joins the cluster that it is sent to."""
    compute = config.compute.model_copy(update={"address": None})
    return absolute(config).model_copy(update={"compute": compute})


def exit_code(details: JobDetails, /) -> int:
    """Of a job that has ended, as a shell would have it; 130 if it was stopped."""
    if details.status == JobStatus.STOPPED:
        return 130
    code = details.driver_exit_code
    if code is None:
        return int(details.status != JobStatus.SUCCEEDED)
    return code if code >= 0 else 128 - code


def _credentials() -> dict[str, str]:
    """The header with the token, if there is one: Ray sends it only if RAY_AUTH_MODE was set when Ray was imported."""
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return {}
    token = os.environ.get("RAY_AUTH_TOKEN", "").strip()
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not token and file.is_file():
        token = file.read_text().strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _reason(error: BaseException) -> str:
    return without_password(" ".join(str(error).split())) or type(error).__name__
