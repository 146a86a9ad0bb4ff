"""The table of ``make test-settings``, without running a suite for each row."""

import machine_settings as script
import pytest


def answers(passed, failed, *names):
    return lambda environment, arguments: (passed, failed, 12.3, list(names))


def test_settings_are_those_of_other_machines(monkeypatch):
    monkeypatch.setattr(script.torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    names = [name for name, _, _ in script.settings()]
    assert len(names) == len(set(names)) == 17
    monkeypatch.setattr(script.torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")  # avx512 would crash
    assert set(names) - {name for name, _, _ in script.settings()} == {"ATEN_CPU_CAPABILITY=avx512"}


@pytest.mark.parametrize(
    ("answer", "status", "row"),
    [
        (answers(7, 0), 0, "| OMP_NUM_THREADS=4 | 7 | 0 | 12 |"),
        (answers(6, 1, "tests.core.test_x::test_y"), 1, "OMP_NUM_THREADS=4: tests.core.test_x::test_y"),
        (answers(0, 0), 1, "| OMP_NUM_THREADS=4 | 0 | 0 | 12 |"),
    ],
)
def test_a_row_tells_what_failed(monkeypatch, capsys, answer, status, row):
    monkeypatch.setattr(script, "run", answer)
    assert script.main(["--only", "THREADS=4", "-m", "numerics"]) == status
    assert row in capsys.readouterr().out.splitlines()


def test_a_setting_reaches_the_tests(tmp_path, monkeypatch):
    """One small run of pytest, with a failure and a broken fixture."""
    (tmp_path / "test_it.py").write_text(
        "import os\nimport pytest\n\n"
        "def test_good():\n    assert os.environ['OMP_NUM_THREADS'] == '3'\n\n"
        "def test_bad():\n    assert 0\n\n"
        "@pytest.fixture\ndef broken():\n    assert 0\n\n"
        "def test_error(broken):\n    pass\n\n"
        "def test_skipped():\n    pytest.skip()\n"
    )
    monkeypatch.setattr(script, "ROOT", tmp_path)
    passed, failed, seconds, names = script.run({"OMP_NUM_THREADS": "3"}, ["-p", "no:cacheprovider"])
    assert (passed, failed) == (1, 2) and seconds > 0
    assert names == ["test_it::test_bad", "test_it::test_error"]


def test_jobs_on_the_cores_end(monkeypatch):
    started, popen = [], script.subprocess.Popen
    monkeypatch.setattr(script.subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1])
    with script.busy(1):
        assert started[0].poll() is None
    assert started[0].returncode < 0
