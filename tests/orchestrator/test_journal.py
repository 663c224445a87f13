"""What waits for a server, comes in order, and never stops who sends it."""

import json
from pathlib import Path
from typing import Any

import pytest

from onelabel.orchestrator import journal
from onelabel.orchestrator.journal import Away, Entry, Journal, Refused


class Server:
    """Takes entries, unless it is away; refuses those of number 13."""

    def __init__(self) -> None:
        self.away, self.asked = False, 0
        self.has: list[int] = []

    def __call__(self, entry: Entry) -> None:
        self.asked += 1
        if self.away:
            raise Away("Connection refused")
        if entry["number"] == 13:
            raise Refused("unlucky")
        self.has.append(entry["number"])


def numbers(path: Path) -> list[int]:
    return [json.loads(line)["number"] for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "waiting.jsonl"


def test_a_server_that_goes_and_comes_back(path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO", logger="onelabel")
    server = Server()
    book = Journal(path, server)
    book.add({"number": 1})
    assert server.has == [1] and not path.exists()
    server.away = True
    book.add({"number": 2}, {"number": 3})
    book.add({"number": 4})
    assert server.asked == 2, "it is not asked again at once"
    assert numbers(path) == [2, 3, 4]
    monkeypatch.setattr(journal, "RETRY_S", 0)
    book.add({"number": 5})
    assert numbers(path) == [2, 3, 4, 5]
    server.away = False
    book.add({"number": 6})
    assert server.has == [1, 2, 3, 4, 5, 6] and not path.exists()
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


def test_what_waits_outlives_the_process(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    server.away = True
    first = Journal(path, server)
    first.add({"number": 1})
    first.add({"number": 2})
    first.close()
    assert numbers(path) == [1, 2] and "2 records for MLflow wait" in caplog.text
    server.away = False
    Journal(path, server).add({"number": 3})
    assert server.has == [1, 2, 3] and not path.exists()


def test_the_end_is_tried_even_so_soon(path: Path) -> None:
    server = Server()
    server.away = True
    book = Journal(path, server)
    book.add({"number": 1})
    server.away = False
    book.close()
    assert server.has == [1] and not path.exists()


def test_what_is_refused_holds_nothing_up(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    book = Journal(path, server)
    book.add({"number": 13}, {"number": 2})
    assert server.has == [2] and "did not take a record: unlucky" in caplog.text
    with pytest.raises(Refused):
        book.add({"number": 13}, strict=True)


def test_a_file_that_cannot_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    server = Server()
    server.away = True
    Journal(tmp_path / "file" / "waiting.jsonl", server).add({"number": 1})
    assert "cannot be kept" in caplog.text
