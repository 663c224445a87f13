import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from onelabel.cluster import submit
from onelabel.cluster.submit import Jobs, exit_code, for_job
from onelabel.configs.load import load
from onelabel.errors import ClusterError


def details(status: JobStatus, code: int | None = None) -> JobDetails:
    return JobDetails(type=JobType.SUBMISSION, entrypoint="", status=status, driver_exit_code=code)


def test_paths_mean_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = [
        "data.labelled=a.nii.gz",
        "data.unlabelled={path: scans/*.nii, where: {site: x}}",
        "data.test=s3://bucket/x",
    ]
    config = load(["singlestrip", *data, "compute.address=127.0.0.1:6379"])
    sent = for_job(config)
    assert sent.data.labelled.path == f"{tmp_path}/a.nii.gz"
    assert sent.data.unlabelled and sent.data.unlabelled.path == f"{tmp_path}/scans/*.nii"
    assert sent.data.unlabelled.where == {"site": "x"}
    assert sent.data.test and sent.data.test.path == "s3://bucket/x"
    assert sent.storage == f"{tmp_path}/runs"
    assert sent.compute.address is None
    same = {"data": config.data, "storage": config.storage, "compute": config.compute}
    assert sent.model_copy(update=same) == config


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.SUCCEEDED, None, 0),
        (JobStatus.FAILED, 2, 2),
        (JobStatus.FAILED, -9, 137),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, -15, 130),
    ],
)
def test_exit_codes(status: JobStatus, code: int | None, expected: int) -> None:
    assert exit_code(details(status, code)) == expected


class Recorder:
    """A client that only remembers what it is given."""

    entrypoint = ""

    def submit_job(self, *, entrypoint: str, **options: Any) -> str:
        self.entrypoint = entrypoint
        return "j"


@pytest.mark.parametrize("kind", ["run", "search"])
def test_a_search_is_sent_as_one(kind: str) -> None:
    client = Recorder()
    data = ["data.labelled=a.nii.gz", "data.unlabelled=s3://bucket/x"]
    presets = ["singlestrip", *(["search"] if kind == "search" else [])]
    assert jobs(client).submit(load([*presets, *data])) == "j"
    assert client.entrypoint == f"python -m onelabel.orchestrator {kind} run.yaml"


class Wavering:
    """A client whose connection holds for a while, and breaks after each piece of log; it ends when all were told."""

    def __init__(self, pieces: list[str], *, holds_s: float = 0) -> None:
        self.pieces, self.calls, self.holds_s = pieces, 0, holds_s

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.calls += 1
        for piece in self.pieces[: self.calls]:
            yield piece
        if self.calls < len(self.pieces):
            await asyncio.sleep(self.holds_s)
            raise RuntimeError("the connection broke")

    def get_job_info(self, job: str) -> JobDetails:
        return details(JobStatus.SUCCEEDED if self.calls >= len(self.pieces) else JobStatus.RUNNING)


def jobs(client: Any) -> Jobs:
    made = object.__new__(Jobs)
    made._client, made._name = client, "cluster 'x'"
    return made


def test_a_broken_connection_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_LOOK_S", 0)
    said: list[str] = []
    assert jobs(Wavering(["one\n", "two\n", "three\n"])).follow("j", said.append).status == JobStatus.SUCCEEDED
    assert "".join(said) == "one\ntwo\nthree\n"


def test_a_connection_that_held_long_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_LOOK_S", 0)
    monkeypatch.setattr(submit, "_PATIENCE_S", 0.1)
    said: list[str] = []
    jobs(Wavering(["one\n", "two\n", "three\n"], holds_s=0.3)).follow("j", said.append)
    assert "".join(said) == "one\ntwo\nthree\n"


def test_a_cluster_that_stays_away_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_PATIENCE_S", -1)
    with pytest.raises(ClusterError, match=r"cluster 'x' does not answer any more \(the connection broke\); job j may"):
        jobs(Wavering(["one\n", "two\n"])).follow("j", str)


@pytest.mark.parametrize("address", ["HEAD:8265", "ray://me:secret@HEAD:10001"])
def test_what_is_no_url_of_a_dashboard_is_refused(address: str) -> None:
    with pytest.raises(ClusterError, match=r"HEAD:\d+' is no URL") as caught:
        Jobs(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("place", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "home", "disabled", "none"])
def test_the_token_is_found_where_ray_looks(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / (".ray/auth_token" if place in ("home", "disabled") else "file")
    file.parent.mkdir(exist_ok=True)
    file.write_text("abc\n")
    if place == "disabled":
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    elif place.startswith("RAY"):
        monkeypatch.setenv(place, str(file) if place.endswith("PATH") else "abc")
    found = submit._credentials()
    assert found == ({} if place in ("disabled", "none") else {"Authorization": "Bearer abc"})
