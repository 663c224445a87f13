import io
import logging
import re
import threading
from collections.abc import Iterator

import pytest
from rich.console import Console

from onelabel.orchestrator import console

log = logging.getLogger("onelabel.orchestrator.anything")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logging as it was before."""
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "WARNING")
    monkeypatch.setenv("RAY_DATA_LOG_LEVEL", "WARNING")
    loggers = [logging.getLogger(name) for name in ("onelabel", *console.CHATTY)]
    levels, handlers = [logger.level for logger in loggers], logging.getLogger().handlers[:]
    logging.getLogger("onelabel").setLevel(logging.INFO)
    yield
    logging.getLogger().handlers = handlers
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal 120 columns wide is sent."""
    written = io.StringIO()
    monkeypatch.setattr(console, "CONSOLE", Console(file=written, force_terminal=True, width=120, color_system=None))
    return written


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_line_for_every_tenth(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    with console.bar("training", 200) as bar:
        for done in range(1, 201):
            clock[0] += 0.1
            bar.update(done, loss=1 / done)
    assert len(caplog.messages) == 10
    assert caplog.messages[0] == "training: 20 of 200, 10/s, 0:00:18 left, loss 0.05"
    assert caplog.messages[-1] == "training: 200 of 200, 10/s, loss 0.005"


def test_a_line_for_every_half_minute(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    bar = console.bar("scoring", 1000)
    for done in range(1, 50):
        clock[0] += 4.0
        bar.update(done)
    bar.close()
    assert [message.split(",")[0] for message in caplog.messages[:2]] == ["scoring: 8 of 1000", "scoring: 16 of 1000"]
    assert "4 s each" in caplog.messages[0]


def test_a_resumed_work_has_an_honest_rate(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    bar = console.bar("training", 1000)
    bar.update(900)
    clock[0] = 10.0
    bar.update(1000)
    assert caplog.messages == ["training: 900 of 1000", "training: 1000 of 1000, 10/s"]


def test_a_bar_on_a_terminal(terminal: io.StringIO) -> None:
    with console.bar("training [a]", 50) as bar:
        bar.update(10, loss=0.5)
        bar.update(40, loss=0.25)
    assert "training [a]" in terminal.getvalue()
    assert re.search(r"40/50 .*/s, 0:00:00 left, loss 0.25", terminal.getvalue())


@pytest.mark.parametrize("on_terminal", [False, True])
def test_bars_take_updates_from_many_threads(on_terminal: bool, request: pytest.FixtureRequest) -> None:
    if on_terminal:
        request.getfixturevalue("terminal")
    with console.bar("training", 400) as bar:
        threads = [threading.Thread(target=lambda: [bar.update(i) for i in range(100)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not any(thread.is_alive() for thread in threads)
    bar.update(400)  # a late one does no harm


def test_a_stage(terminal: io.StringIO) -> None:
    console.stage("round-01 [base]")
    assert "round-01 [base]" in terminal.getvalue()


def test_a_stage_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    console.stage("round-01")
    assert caplog.messages == ["== round-01 =="]


def test_log_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_up_logging()
    console.set_up_logging()
    log.info("%s", "word " * 60)
    log.debug("hidden")
    logging.getLogger("mlflow.store").info("chatter")
    logging.getLogger("anyone").warning("heard")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d INFO word", lines[0]) and lines[1].endswith("WARNING heard")


def test_log_lines_on_a_terminal(terminal: io.StringIO) -> None:
    console.set_up_logging(verbose=True)
    with console.bar("training", 10) as bar:
        log.debug("[brackets] stay")
        bar.update(10)
    assert "[brackets] stay" in terminal.getvalue()


def test_a_table() -> None:
    written = io.StringIO()
    table = console.table("Rounds", ["name", "dice", "scans"], [["first", 0.5, 10], ["second", None, 9]])
    Console(file=written, width=80).print(table)
    assert [column.justify for column in table.columns] == ["left", "right", "right"]
    assert "0.500" in written.getvalue() and "–" in written.getvalue() and "Rounds" in written.getvalue()
