"""The command line, in this process, and in one of its own for signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from bayes_svdo import cli, data
from bayes_svdo.experiments import compare_methods, figures, runs, training
from bayes_svdo.experiments.compare import Settings as Comparison
from bayes_svdo.experiments.training import KLS, Settings
from bayes_svdo.inference import History, Posterior
from bayes_svdo.models.registry import NETWORKS

# One step per epoch of a small network.
TINY = ["--model", "64-8-10", "--batch-size", "1437", "--device", "cpu"]


def invoke(*arguments):
    # A wide terminal, so that no expected text is broken into lines.
    return CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, [str(a) for a in arguments])


def complaint(result):
    """The one line of an error."""
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run's folder and what the command printed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    result = invoke("fit", *TINY, "--epochs", 3, "--lr", 0.01, "--seed", 5, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder, result


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished run, to be damaged or replaced."""
    target = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(finished[0]), str(target)], check=True)
    return target


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(runs, "draw", lambda run, folder, snapshots=None: [])


# Help.


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_help_lists_every_command(arguments):
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert {"fit", "show", "demo", "compare", "figure"} <= set(result.stdout.split())


def test_the_help_of_fit_names_every_setting_network_data_set_and_kl():
    result = invoke("fit", "--help")
    assert result.exit_code == 0
    words = set(re.findall(r"[\w-]+", result.stdout))
    options = {"--" + field.name.replace("_", "-") for field in fields(Settings)}
    assert options | {*NETWORKS, *data.available(), *KLS} <= words
    assert "kingma2015" not in words


def test_version():
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"bayes-svdo {version('bayes-svdo')}\n")


def test_the_module_runs_as_the_command_does():
    """What pyproject's entry point calls, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "bayes_svdo", "fit", "--data", "digit"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    assert re.fullmatch(r'bayes-svdo: unknown data set "digit"\. .*"digits".*\n', result.stderr)


@pytest.mark.parametrize("late", ["typer", "torch"])
def test_ctrl_c_while_modules_are_imported_is_one_line(late):
    """What pyproject's entry point calls, interrupted at the import of one of them."""
    program = f"""if True:
        import sys
        from bayes_svdo.__main__ import main
        class Interruption:
            def find_spec(self, name, *others):
                if name == "{late}":
                    raise KeyboardInterrupt
        assert not {{"typer", "torch", "numpy"}} & set(sys.modules)
        sys.meta_path.insert(0, Interruption())
        sys.argv = ["bayes-svdo", "fit"]
        main()
    """
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stderr == "bayes-svdo: interrupted\n"
    assert (found.returncode, found.stdout) == (130, "")


@pytest.mark.parametrize("command", [(), ("fit",), ("demo",), ("compare",), ("figure",)])
def test_the_help_fits_into_80_columns_and_flags_take_no_value(command):
    shown = CliRunner(env={"COLUMNS": "80"}).invoke(cli.app, [*command, "--help"]).stdout
    options = [line for line in shown.splitlines() if line.startswith("│ --")]
    assert options
    assert not re.findall(r"--[\w-]*…|--no-", shown)
    flags = [line for line in options if "<bool>" in line.lower() or "boolean" in line.lower()]
    assert all("--help" in line for line in flags)


# Errors: one line, exit code 2, nothing written.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "lenet-300-10"], r'"lenet-300-10".*Did you mean "lenet-300-100"'),
        (["--model", "784-256-10"], "Try 64-256-10"),
        (["--data", "minst"], '"minst".*Did you mean "mnist"'),
        (["--kl", "kingma2015"], "alpha <= 1 only.*Known: .*molchanov2017"),
        (["--seed", str(10**20)], "seed must be an integer of 64 bits.*100000000000000000000"),
        (["--kl", "molchanov"], 'unknown kl "molchanov".*Did you mean "molchanov2017"'),
        (["--device", "cud"], '"cud".*Did you mean "cuda"'),
        (["--precision", "32"], 'unknown precision "32"'),
        (["--epochs", "-1"], "epochs must be.*-1"),
        (["--batch-size", "0"], "batch_size must be.*0"),
        (["--batch-size", "5000"], "batch_size=5000.*1437"),
        (["--lr", "0"], "lr must be.*0"),
        (["--sigma-lr", "-1"], "sigma_lr must be.*-1"),
        (["--threshold", "nan"], "threshold must be.*nan"),
        (["--init-log-sigma2", "inf"], "init_log_sigma2 must be finite"),
        (["--kl-warmup", "0.5", "0.1"], r"kl_warmup.*\(0\.5, 0\.1\)"),
        (["--root", "/no/such/folder"], "/no/such/folder.*not an existing folder"),
        (["--epochs", "many"], "--epochs.*integer"),
        (["--epoch", "1"], "No such option.*--epoch"),
        (["--kl-warmup", "0.5"], "--kl-warmup"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_argument_is_one_line_with_exit_code_2(arguments, words, tmp_path):
    out = tmp_path / "run"
    result = invoke("fit", *arguments, "--out", out)
    assert result.exit_code == 2, result.output
    assert re.search(words, complaint(result))
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_gives_the_closest_match():
    result = invoke("shwo", "run")
    assert result.exit_code == 2
    assert re.search("shwo.*Did you mean 'show'", complaint(result))


def test_missing_and_damaged_data_are_one_line(tmp_path):
    result = invoke("fit", "--data", "boston", "--root", tmp_path, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "Copy the folder UCI_Datasets/bostonHousing" in complaint(result)

    for part in ("train", "t10k"):
        for kind in ("images-idx3", "labels-idx1"):
            (tmp_path / f"{part}-{kind}-ubyte").write_bytes(b"not an idx file")
    result = invoke("fit", "--data", "mnist", "--root", tmp_path, "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "train-images-idx3-ubyte" in complaint(result)


def test_traceback_shows_where_an_error_comes_from():
    result = invoke("--traceback", "fit", "--data", "digit")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "registry.py" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("bayes-svdo: unknown data set")


def test_a_bug_is_not_passed_off_as_bad_input(monkeypatch):
    monkeypatch.setattr(training, "run", lambda *args, **kwargs: {}["bug"])
    result = invoke("fit")
    assert result.exit_code == 1
    assert isinstance(result.exception, KeyError)


# fit.


def test_fit_writes_a_run_that_says_what_was_run_and_what_came_out(finished):
    folder, result = finished
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "config.json",
        "posterior",
        "history.csv",
        "summary.json",
        "training.png",
        "log_alpha.png",
        "weights.png",
    }
    assert list(folder.parent.iterdir()) == [folder]

    config = json.loads((folder / "config.json").read_text())
    expected = Settings(
        model="64-8-10", data="digits", epochs=3, batch_size=1437, lr=0.01, seed=5, device="cpu"
    )
    assert Settings(**config["settings"] | {"kl_warmup": (0.025, 0.1)}) == expected
    assert config["data"] | {"scaling": None} == {
        "name": "digits",
        "train": 1437,
        "test": 360,
        "inputs": [1, 8, 8],
        "classes": 10,
        "scaling": None,
    }
    assert config["versions"]["torch"] == version("torch")
    assert config["machine"]["device"] == "cpu"

    assert len((folder / "history.csv").read_text().splitlines()) == 1 + 3
    assert "epoch 3/3" in result.stderr


def test_the_errors_in_the_summary_are_those_of_the_saved_posterior(finished):
    folder, result = finished
    summary = json.loads((folder / "summary.json").read_text())
    posterior = Posterior.load(folder / "posterior")
    x, y = data.load("digits").test
    for when, threshold in (("before_pruning", float("inf")), ("after_pruning", 3.0)):
        wrong = posterior.prune(threshold)(x).argmax(-1) != y
        error = 100 * float(wrong.double().mean())
        assert summary["test"][when]["error_percent"] == pytest.approx(error, abs=1e-9)
        assert f"{error:.2f} %" in result.stdout
    assert summary["sparsity"]["nonzero"] == posterior.sparsity().nonzero
    assert summary["interrupted"] is False


def test_fit_prints_a_row_per_layer_and_where_the_pictures_are(finished):
    folder, result = finished
    for layer in ("fc1.weight", "fc2.weight"):
        assert re.search(rf"{layer}\D+\d", result.stdout)
    for picture in ("training.png", "log_alpha.png", "weights.png"):
        path = folder / picture
        assert str(path) in result.stdout
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_folder_with_content_is_refused_before_training(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(training, "train", lambda *args: pytest.fail("it was trained"))
    result = invoke("fit", *TINY, "--out", folder)
    assert result.exit_code == 2
    assert re.search("is not empty.*--overwrite", complaint(result))


def test_overwrite_replaces_a_run_and_all_of_it(copy, no_pictures):
    result = invoke("fit", *TINY, "--epochs", 1, "--out", copy, "--overwrite")
    assert result.exit_code == 0, result.output
    assert json.loads((copy / "config.json").read_text())["settings"]["epochs"] == 1
    assert not (copy / "weights.png").exists()
    assert list(copy.parent.iterdir()) == [copy]


def test_overwrite_replaces_nothing_but_a_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    result = invoke("fit", *TINY, "--out", tmp_path, "--overwrite")
    assert result.exit_code == 2
    assert re.search("not a run folder.*thesis.tex", complaint(result))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_full_disk_leaves_nothing_half_written(copy, monkeypatch, no_pictures):
    def full(self, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(History, "to_csv", full)
    before = sorted(copy.rglob("*"))
    result = invoke("fit", *TINY, "--epochs", 1, "--out", copy, "--overwrite")
    assert result.exit_code == 2
    assert "No space left" in result.stderr.splitlines()[-1]
    assert list(copy.parent.iterdir()) == [copy]
    assert sorted(copy.rglob("*")) == before
    assert runs.load(copy).config["settings"]["epochs"] == 3


def test_an_animation_is_drawn_on_request(tmp_path):
    out = tmp_path / "run"
    result = invoke("fit", *TINY, "--epochs", 3, "--animation", "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "sparsification.gif").read_bytes().startswith(b"GIF8")
    assert str(out / "sparsification.gif") in result.stdout


# Ctrl-C.


def test_ctrl_c_while_training_leaves_a_usable_run(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "bayes_svdo.cli", "fit", *TINY, "--compile", "no"]
    command += ["--epochs", "1000000"]
    process = subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # A shell starts what it puts into the background deaf to Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    before = []  # a CUDA build of torch may have something to say
    while not before or (before[-1] and not before[-1].startswith("epoch ")):
        before.append(process.stderr.readline())
    assert before[-1].startswith("epoch 1/1000000"), before
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 130, stderr
    assert re.fullmatch(r"bayes-svdo: training was interrupted after epoch \d+ of .*\n", stderr)
    assert "fc1.weight" in stdout
    assert list(tmp_path.iterdir()) == [out]

    run = runs.load(out)
    assert run.interrupted
    assert 1 <= len(run.posterior.history) < 1_000_000

    shown = invoke("show", out)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"interrupted after epoch \d+ of 1000000", shown.stdout)


def test_ctrl_c_before_training_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", interrupted)
    result = invoke("fit", *TINY, "--out", tmp_path / "runs" / "run")
    assert result.exit_code == 130
    assert complaint(result) == "bayes-svdo: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_within_the_first_epoch_leaves_a_run_without_curves(tmp_path, monkeypatch):
    def interrupted(self, end):
        raise KeyboardInterrupt

    monkeypatch.setattr(History, "append", interrupted)
    out = tmp_path / "run"
    result = invoke("fit", *TINY, "--out", out)
    assert result.exit_code == 130
    assert "interrupted after epoch 0 of 100" in complaint(result)
    assert len(runs.load(out).posterior.history) == 0
    assert {"log_alpha.png", "weights.png"} <= {path.name for path in out.iterdir()}
    assert not (out / "training.png").exists()


def test_ctrl_c_while_drawing_leaves_a_complete_run(tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "draw", interrupted)
    out = tmp_path / "run"
    result = invoke("fit", *TINY, "--epochs", 1, "--out", out)
    assert result.exit_code == 130
    assert not runs.load(out).interrupted


# show.


def test_show_prints_what_fit_printed_and_draws_the_pictures_again(finished, copy):
    (copy / "weights.png").unlink()
    (copy / "training.png").write_bytes(b"")
    result = invoke("show", copy)
    assert result.exit_code == 0, result.output
    assert result.stdout == finished[1].stdout.replace(str(finished[0]), str(copy))
    for picture in ("weights.png", "training.png"):
        assert (copy / picture).read_bytes().startswith(b"\x89PNG")
    assert not [path for path in copy.iterdir() if path.name.startswith(".")]


def test_show_prints_the_table_where_no_picture_can_be_drawn(finished, copy, monkeypatch):
    def refused(run, folder):
        raise PermissionError(13, "Permission denied", str(folder / "training.png"))

    monkeypatch.setattr(runs, "draw", refused)
    result = invoke("show", copy)
    assert result.exit_code == 0
    assert result.stdout == finished[1].stdout.partition("\nRun folder")[0]
    assert re.search("pictures were not drawn.*training.png", complaint(result))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


def _tensors(run):
    (path,) = (run / "posterior").glob("*.safetensors")
    return path


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: _truncate(_tensors(run)), "is damaged"),
        (lambda run: _tensors(run).unlink(), "safetensors"),
        (lambda run: _truncate(run / "posterior" / "posterior.json"), "is damaged"),
        (lambda run: (run / "posterior" / "posterior.json").unlink(), "posterior.json"),
        (lambda run: _truncate(run / "config.json"), "config.json is damaged"),
        (lambda run: _truncate(run / "summary.json"), "summary.json is damaged"),
        (lambda run: (run / "summary.json").unlink(), "it has no summary.json"),
        (lambda run: (run / "config.json").unlink(), "not a run folder.*config.json"),
        (lambda run: (run / "config.json").write_text("[]"), "config.json is damaged"),
        (lambda run: (run / "config.json").write_text('{"format": 99}'), "format"),
        (lambda run: (run / "summary.json").write_text("{}"), "summary.json is damaged: .*test"),
    ],
)
def test_show_refuses_a_damaged_run_in_one_line(copy, damage, words):
    damage(copy)
    result = invoke("show", copy)
    assert result.exit_code == 2
    assert re.search(words, complaint(result))


def test_show_refuses_what_is_no_folder(tmp_path):
    result = invoke("show", tmp_path / "nothing")
    assert result.exit_code == 2
    assert re.search("nothing is not a folder", complaint(result))


# demo.


def test_demo_hands_its_run_to_the_report(finished, monkeypatch):
    from bayes_svdo.experiments import demo

    folder, printed = finished
    calls = []

    def stand_in(out, seed, *, overwrite):
        calls.append((out, seed, overwrite))
        return runs.load(folder), [folder / "training.png"]

    monkeypatch.setattr(demo, "demo", stand_in)
    result = invoke("demo", "--out", folder, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert calls == [(folder, 3, False)]
    assert result.stdout.splitlines()[:-1] == printed.stdout.splitlines()[:-3]
    assert result.stdout.splitlines()[-1].strip() == str(folder / "training.png")


def test_the_global_random_state_is_not_needed(tmp_path, no_pictures):
    """The same seed gives the same run, whatever was drawn before."""
    summaries = []
    for name in ("one", "two"):
        torch.rand(3)
        assert invoke("fit", *TINY, "--epochs", 2, "--out", tmp_path / name).exit_code == 0
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text())["test"])
    assert summaries[0] == summaries[1]


# figure.


def test_figure_writes_the_picture_and_the_numbers_and_says_where(tmp_path):
    out = tmp_path / "figures"
    result = invoke("figure", "kl", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [str(out / "kl.png"), str(out / "kl.csv")]
    assert sorted(path.name for path in out.iterdir()) == ["kl.csv", "kl.png"]


def test_the_help_of_figure_names_every_figure():
    result = invoke("figure", "--help")
    assert {*figures.FIGURES, figures.ALL} <= set(re.findall(r"[\w-]+", result.stdout))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["gradient-varience"], 'unknown figure.*Did you mean "gradient-variance"'),
        (["nonsense"], 'unknown figure "nonsense".*Known: kl, gradient-variance, shrinkage, all'),
        ([], "Missing argument.*NAME"),
    ],
)
def test_a_figure_that_is_not_there_is_one_line(arguments, words, tmp_path):
    result = invoke("figure", *arguments, "--out", tmp_path / "figures")
    assert result.exit_code == 2
    assert re.search(words, complaint(result))
    assert list(tmp_path.iterdir()) == []


def test_figures_go_into_a_folder_only(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("figure", "all", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "is a file" in complaint(result)


# compare.


@pytest.fixture
def fits(monkeypatch):
    """Stand-ins for the fits of a comparison, of which all but so many are interrupted."""
    state = {"done": 0, "allowed": 6}

    def evaluate(method, name, task, seed, device):
        if state["done"] == state["allowed"]:
            raise KeyboardInterrupt
        state["done"] += 1
        return compare_methods.Outcome(90.0 + seed, 75.0, 0.2, 160, 640, None, 0.1, None)

    monkeypatch.setattr(compare_methods, "evaluate", evaluate)
    return state


def test_compare_prints_a_line_per_result_and_the_table_and_show_the_table_again(fits, tmp_path):
    out = tmp_path / "compare"
    result = invoke("compare", "digits", "--seeds", 2, "--out", out)
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    assert lines[0] == "digits, seed 0, VD-ARD: accuracy 90.0 %, zero weights 75.0 %, 0.1 s"
    assert len(lines) == 6
    assert re.search(r"digits\W+RVM\W+90.5 ± 0.7\W+94.5", result.stdout)
    assert str(out) in result.stdout
    shown = invoke("show", out)
    assert (shown.exit_code, shown.stdout) == (0, result.stdout)


def test_compare_stopped_by_ctrl_c_says_so_and_continues(fits, tmp_path):
    fits["allowed"] = 2
    command = ["compare", "digits", "--seeds", 2, "--out", tmp_path / "compare"]
    result = invoke(*command)
    assert result.exit_code == 130
    assert re.search("interrupted after 2 of 6 results.*continues", result.stderr.splitlines()[-1])
    fits["allowed"] = 6
    result = invoke(*command)
    assert result.exit_code == 0, result.output
    assert len(result.stderr.splitlines()) == 4
    again = invoke(*command)
    assert again.exit_code == 2
    assert re.search("is not empty.*--overwrite", complaint(again))


def test_the_help_of_compare_names_every_data_set():
    result = invoke("compare", "--help")
    assert set(compare_methods.METHODS) <= set(re.findall(r"[\w+]+", result.stdout))


@pytest.mark.parametrize(
    ("name", "words", "minutes"),
    [
        ("compare", "Ten seeds of both: some five minutes on one core", 5),
        ("compare_mnist", "MNIST, only if named and without the RVM: some twelve per seed", 12),
    ],
)
def test_the_help_of_compare_says_how_long_it_took(name, words, minutes):
    path = Path(__file__).parents[1] / f"benchmarks/results/{name}.json"
    measured = json.loads(path.read_text())
    settings, results = measured["settings"], measured["results"]
    seconds = sum(row["seconds"] for row in results)
    assert seconds / 60 == pytest.approx(minutes, abs=0.5)
    assert measured["machine"]["threads"] == 1
    if name == "compare":
        assert (tuple(settings["data"]), settings["seeds"]) == (Comparison.data, Comparison.seeds)
    else:
        assert (settings["data"], settings["seeds"]) == (["mnist"], 1)
        assert "RVM" not in {row["method"] for row in results}
        assert "mnist" not in Comparison.data
    text = " ".join(invoke("compare", "--help").stdout.split())
    assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["digit"], 'unknown data set "digit".*Did you mean "digits"'),
        (["--seeds", "0"], "seeds must be.*0"),
        (["digits", "digits"], "each set once"),
    ],
)
def test_a_comparison_that_cannot_be_is_one_line(fits, arguments, words, tmp_path):
    result = invoke("compare", *arguments, "--out", tmp_path / "compare")
    assert result.exit_code == 2
    assert re.search(words, complaint(result))
    assert list(tmp_path.iterdir()) == []
