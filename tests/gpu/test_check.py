"""The script of the GPU checks runs on a CPU at small sizes, so that it keeps up with the code."""

import pytest
import torch

from tests.gpu import check


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> check.Bench:
    return check.Bench(torch.device("cpu"), tmp_path_factory.mktemp("checks"))


@pytest.mark.parametrize("name", check.CHECKS)
def test_a_check_runs_on_a_cpu_and_passes(bench, name):
    rows = check.run_checks(bench, [name])
    assert rows and all(row.passed for row in rows), rows


def test_an_error_is_a_failed_row_and_the_other_checks_still_run(bench, monkeypatch):
    def broken(_):
        yield check.Row("first", "1", "1", True)
        raise ValueError("no memory\nat all")

    monkeypatch.setitem(check.CHECKS, "parity", broken)
    monkeypatch.setitem(check.CHECKS, "levels", lambda _: iter([check.Row("second", "2", "3", False)]))
    rows = check.run_checks(bench, ["parity", "levels"])
    assert [(row.measured, row.passed) for row in rows] == [("1", True), ("ValueError: no memory", False), ("2", False)]
    table = check.markdown(rows, "a device")
    assert "| second | 2 | 3 | **FAIL** |" in table and "| first | 1 | 1 | pass |" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_exits_with_2_and_one_sentence(capsys):
    assert check.main([]) == 2
    assert capsys.readouterr().err == "no CUDA device was found; `--device cpu` runs the checks at small sizes\n"
