"""``lightning-plugins plot``: the picture, and mistakes in at most five lines."""

import subprocess
import sys

import pytest

from lightning_plugins.cli import main

METRICS = "epoch,ode/edge_ratio_step,ode/loss,ode/time,step\n0,0.5,2.0,0.1,4\n0,,,,5\n0,0.75,1.0,0.2,9\n"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "lightning_logs/version_3"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(METRICS)
    return folder


@pytest.mark.parametrize(
    "words", ["lightning_logs", "lightning_logs/version_3", "lightning_logs/version_3/metrics.csv"]
)
def test_plot_writes_the_picture_and_tells_where(run, capsys, words):
    main(["plot", words])
    assert capsys.readouterr().out == "Picture: lightning_logs/version_3/ode_diagnostics.png\n"
    assert (run / "ode_diagnostics.png").read_bytes().startswith(b"\x89PNG")


def test_output_names_the_file_and_its_format(run, tmp_path, capsys):
    main(["plot", ".", "--output", "pages/mine.pdf"])
    assert capsys.readouterr().out == "Picture: pages/mine.pdf\n"
    assert (tmp_path / "pages/mine.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "the following arguments are required: run.\nAll options: lightning-plugins plot --help"),
        (["."], "'.' and its version_N hold neither metrics.csv nor events files: train with CSVLogger or"),
        (["nowhere"], "no run is called 'nowhere': give a run's folder, its metrics.csv or events file."),
        (["bare.csv"], "bare.csv: nothing to draw, for none of ode/loss, "),
        (["empty.csv"], "empty.csv is empty; give the metrics.csv that Lightning's CSVLogger wrote"),
        (["good.csv", "--output", "page.doc"], "output must end in .png, .pdf or .svg, got 'page.doc'."),
        (["good.csv", "--output", "good.csv/page.png"], "File exists: 'good.csv'"),
        (["good.csv", "--outp", "page.pdf"], "unrecognized arguments: --outp page.pdf.\nAll options: "),
        (["good.csv", "other.csv"], "unrecognized arguments: other.csv."),
        (["good.csv", "--output"], "expected one argument"),
    ],
)
def test_mistakes_are_told_in_five_lines_with_status_two(tmp_path, capsys, words, told):
    (tmp_path / "bare.csv").write_text("step,train/loss\n1,2\n")
    (tmp_path / "empty.csv").touch()
    (tmp_path / "good.csv").write_text(METRICS)
    with pytest.raises(SystemExit) as stop:
        main(["plot", *words])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("error: ") and told in error
    assert len(error.splitlines()) <= 5
    assert {path.name for path in tmp_path.iterdir()} == {"bare.csv", "empty.csv", "good.csv"}


def test_help_of_plot_imports_nothing_heavy():
    script = (
        "import sys\nfrom lightning_plugins.cli import main\n"
        "try: main(['plot', '--help'])\nexcept SystemExit as stop: assert not stop.code\n"
        "assert not {'torch', 'lightning', 'matplotlib', 'numpy'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert "--output" in shown and "version_N" not in shown.split("options:")[1]


def test_completion_offers_plot_and_completes_files(run, tmp_path):
    command = [sys.executable, "-m", "lightning_plugins", "--print_completion", "shtab-bash"]
    script = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (tmp_path / "completion.sh").write_text(script)
    for words, reply in {"plo": "plot", "plot ligh": "lightning_logs", "plot . --outp": "--output"}.items():
        line = (
            f"source completion.sh; COMP_WORDS=(lightning-plugins {words}); COMP_CWORD={len(words.split())}; "
            "_shtab_lightning_plugins; echo ${COMPREPLY[@]}"
        )
        told = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
        assert told.stdout.split() == [reply]
