"""What a sweep shows: a table that stands in its place on a terminal, plain lines in a log."""

import json
import re
import sys

import pytest
import stub_sweep

from moejax.sweep import board, folder, outcome


@pytest.fixture
def workdir(tmp_path):
    folder.write(tmp_path, stub_sweep.describe())
    return tmp_path


def progress(workdir, name, step, loss):
    row = {"step": step, "loss": loss, "ema_loss": loss + 1}
    (workdir / name).mkdir(exist_ok=True)
    (workdir / name / "metrics.jsonl").write_text(f"{json.dumps(row)}\n" + '{"step": ')  # the next is being written


def console(workdir, monkeypatch, jobs=1):
    clock = [100.0]
    monkeypatch.setattr(board.time, "monotonic", lambda: clock[0])
    return board.Console(workdir, folder.collect(workdir).points, jobs), clock


def screen(text: str) -> list[str]:
    """What a terminal shows after this."""
    lines = [""]
    for piece in re.split(r"(\x1b\[\d*[AJ]|\n)", text):
        if piece == "\n":
            lines.append("")
        elif piece == "\x1b[J":
            lines[-1:] = [""]
        elif found := re.fullmatch(r"\x1b\[(\d+)A", piece):
            del lines[len(lines) - int(found[1]) :]
        else:
            lines[-1] += piece
    return lines


def test_in_a_log_a_change_is_a_line_and_every_few_minutes_how_far_the_points_are(workdir, monkeypatch, capsys):
    shown, clock = console(workdir, monkeypatch)
    shown.started("a_s0")
    progress(workdir, "a_s0", 10, 4.0)
    shown.draw(["a_s0"])
    assert capsys.readouterr().err == f"a_s0 started; its log is {workdir}/a_s0/log.txt\n"
    clock[0] += board.LOG_EVERY
    shown.draw(["a_s0"])
    clock[0] += board.LOG_EVERY
    progress(workdir, "a_s0", 20, 3.0)
    shown.draw(["a_s0"])
    first, _, second, summary = capsys.readouterr().err.splitlines()
    assert first == "a_s0 step 10/30, loss 4.0000, EMA 5.0000"
    assert second == "a_s0 step 20/30, loss 3.0000, EMA 4.0000, 3:00 left"  # 10 steps in 3 minutes
    # 20 of 30 steps cost two thirds of its FLOPs; the three others cost as much each
    assert summary == "1 running, 3 waiting; about 30:00 left"
    numbers = outcome.Numbers(seconds=540.0, loss=3.0, validation_loss=4.0)
    outcome.write(workdir / "a_s0", outcome.Outcome(status="done", numbers=numbers))
    shown.ended("a_s0", "done")
    shown.ended("a_s1", "failed: model.d_model=7 is odd; make it even")
    assert capsys.readouterr().err.splitlines() == [
        "a_s0 done in 9:00, loss 3.0000, validation loss 4.0000",
        "a_s1 failed: model.d_model=7 is odd; make it even",
    ]


def test_on_a_terminal_the_table_stays_in_its_place_under_what_is_said(workdir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(board.shutil, "get_terminal_size", lambda: (80, 24))
    shown, clock = console(workdir, monkeypatch)
    text = ""
    for step in (10, 20):
        shown.started("a_s0")
        progress(workdir, "a_s0", step, 4.0)
        for _ in range(2):
            shown.draw(["a_s0"])
            clock[0] += 5
        shown.ended("b_s0", "failed: for a reason")
        text += capsys.readouterr().err
    shown.draw(["a_s0"])
    text += capsys.readouterr().err
    lines = screen(text)
    assert lines[:2] == ["b_s0 failed: for a reason"] * 2
    assert lines[2].split() == ["point", "status", "step", "loss", "EMA", "left"]
    assert lines[3].split() == ["a_s0", "running", "20/30", "4.0000", "5.0000"]
    assert [line.split() for line in lines[4:7]] == [[name, "waiting"] for name in stub_sweep.NAMES[1:]]
    assert lines[7:] == ["1 running, 3 waiting", ""]
    shown.close()
    assert screen(text + capsys.readouterr().err) == ["b_s0 failed: for a reason"] * 2 + [""]


def test_a_terminal_too_low_for_all_points_shows_those_that_run(workdir, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(board.shutil, "get_terminal_size", lambda: (30, 7))
    shown, _ = console(workdir, monkeypatch)
    shown.draw(["b_s0", "b_s1"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines] == ["point", "b_s0", "b_s1", "2"]
    assert all(len(line) < 30 for line in lines)


def test_the_table_of_results_has_a_row_a_point_with_a_dash_for_what_there_is_not(workdir):
    numbers = outcome.Numbers(
        loss=3.7, ema_loss=3.71, validation_loss=3.68, tokens_per_second=4000.4, seconds=201.0, dropped=0.0213,
        imbalance=1.4,
    )  # fmt: skip
    outcome.write(workdir / "a_s0", outcome.Outcome(status="done", numbers=numbers))
    heads, first, second, *_ = board.table(folder.collect(workdir).points).splitlines()
    assert heads.split() == "point status loss EMA(0.001) validation tokens/s time dropped imbalance".split()
    assert first.split() == "a_s0 done 3.7000 3.7100 3.6800 4,000 3:21 2.1% 1.40".split()
    assert second.split() == ["a_s1", "waiting", *"-" * 7]
    assert len({len(line) for line in (heads, first, second)}) == 1
