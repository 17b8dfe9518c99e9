"""The command line ``bayes-svdo``: a thin layer over ``bayes_svdo.experiments``.

What takes long to import is imported by the command that needs it, so that help is quick. A new
command needs ``@app.command()`` and nothing else: errors, Ctrl-C and exit codes are handled in
:class:`_Commands` for all of them.
"""

from __future__ import annotations

import errno
import sys
import traceback as tracebacks
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

if TYPE_CHECKING:
    from rich.console import RenderableType

    from bayes_svdo.experiments.runs import Run

_BAD_INPUT, _INTERRUPTED = 2, 130
# What the library raises for bad input, bad files and bad data; all else is a bug of ours.
_EXPECTED = (ValueError, TypeError, OSError, FloatingPointError)


class _Commands(TyperGroup):
    """Errors as one line with exit code 2; Ctrl-C as one line with exit code 130."""

    def invoke(self, ctx: Any) -> Any:  # typer's own Context, private or Click's by version
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _complain("interrupted")
            raise typer.Exit(_INTERRUPTED) from None
        except _EXPECTED as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # `bayes-svdo show run | head`: no error of ours
            if ctx.params.get("traceback"):
                tracebacks.print_exc()
            _complain(str(error) or type(error).__name__)
            raise typer.Exit(_BAD_INPUT) from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            code = super().main(*args, **(kwargs | {"standalone_mode": False}))
        except Exception as error:
            # Errors of usage; their class lived in Click before it lived in Typer.
            if not hasattr(error, "format_message"):
                raise
            _complain(f"{error.format_message().rstrip('.')}. See --help.")
            code = _BAD_INPUT
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(
    name="bayes-svdo",
    cls=_Commands,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

_MODEL, _TRAINING, _OUTPUT = "Model and prior", "Training", "Data and output"
_FLAG = ""  # takes no value, which help shows as <bool> else


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"bayes-svdo {version('bayes-svdo')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=_FLAG,
            callback=_version,
            is_eager=True,
            help="Show the version and exit.",
        ),
    ] = False,
    traceback: Annotated[
        bool,
        typer.Option(
            "--traceback",
            metavar=_FLAG,
            envvar="BAYES_SVDO_TRACEBACK",
            help="Show where an error comes from; goes before the command.",
        ),
    ] = False,
) -> None:
    """Networks that prune themselves: sparse variational dropout as probabilistic programming."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    epilog="Examples:\n\n"
    "  bayes-svdo fit --data digits --epochs 200 --lr 2e-3\n\n"
    "  bayes-svdo fit --data mnist --root ~/data --epochs 60 --batch-size 200 --lr 2e-3 "
    "--prune-while-training --out runs/mnist"
)
def fit(
    model: Annotated[
        str,
        typer.Option(
            help="lenet-300-100, lenet-5-caffe, dense-300, dense-256, dense-100-40, "
            "logistic-regression, linear-regression, or the sizes of all layers: 784-256-10.",
            rich_help_panel=_MODEL,
        ),
    ] = "lenet-300-100",
    data: Annotated[
        str,
        typer.Option(
            help="digits, mnist, fashion-mnist; for regression: diabetes, boston, concrete, "
            "energy, kin8nm, yacht.",
            rich_help_panel=_OUTPUT,
        ),
    ] = "digits",
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data's files; else $BAYES_SVDO_DATA, the user's cache, or a "
            "download into it.",
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the run; runs/DATA-MODEL if not given.", rich_help_panel=_OUTPUT
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            metavar=_FLAG,
            help="Replace the run in --out.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    animation: Annotated[
        bool,
        typer.Option(
            "--animation",
            metavar=_FLAG,
            help="Draw the first layer over the epochs as a GIF.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    epochs: Annotated[
        int, typer.Option(help="Passes over the training data.", rich_help_panel=_TRAINING)
    ] = 100,
    batch_size: Annotated[
        int, typer.Option(help="Data points per step.", rich_help_panel=_TRAINING)
    ] = 100,
    lr: Annotated[
        float,
        typer.Option(
            help="Learning rate of Adam: constant for half of training, then falling to 0.",
            rich_help_panel=_TRAINING,
        ),
    ] = 1e-3,
    sigma_lr: Annotated[
        float | None,
        typer.Option(help="Learning rate of log σ²; --lr if not given.", rich_help_panel=_TRAINING),
    ] = None,
    kl_warmup: Annotated[
        tuple[float, float],
        typer.Option(
            metavar="START END",
            help="Fractions of training between which the KL's weight rises from 0 to 1.",
            rich_help_panel=_TRAINING,
        ),
    ] = (0.025, 0.1),
    prune_while_training: Annotated[
        bool,
        typer.Option(
            "--prune-while-training",
            metavar=_FLAG,
            help="Zero pruned weights for good at the end of each epoch, once the KL has full "
            "weight.",
            rich_help_panel=_TRAINING,
        ),
    ] = False,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda or cuda:1.", rich_help_panel=_TRAINING)
    ] = "auto",
    devices: Annotated[
        int | None,
        typer.Option(
            help="Processes, one per device; --batch-size is that of each. If not given: as many "
            "as torchrun started, else one.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    compile: Annotated[
        str,
        typer.Option(
            help="auto, yes or no: trace and compile the objective, which takes up to a minute and "
            "halves a step. auto: for runs of 10,000 steps or more.",
            rich_help_panel=_TRAINING,
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(help="32-true, 64-true, bf16-mixed or 16-mixed.", rich_help_panel=_TRAINING),
    ] = "32-true",
    seed: Annotated[
        int,
        typer.Option(
            help="Of initial weights, order of the data, and noise.", rich_help_panel=_TRAINING
        ),
    ] = 0,
    kl: Annotated[
        str,
        typer.Option(
            help="KL to the log-uniform prior: exact, molchanov2017 or poster2016; "
            "or empirical_bayes, a proper prior.",
            rich_help_panel=_MODEL,
        ),
    ] = "molchanov2017",
    init_log_sigma2: Annotated[
        float, typer.Option(help="Initial log σ² of every weight.", rich_help_panel=_MODEL)
    ] = -10.0,
    threshold: Annotated[
        float,
        typer.Option(help="Prune a weight where log α is at least this.", rich_help_panel=_MODEL),
    ] = 3.0,
) -> None:
    """Train a network, prune it, and write a run folder: posterior, numbers and pictures.

    Test error is measured once, at the end. Ctrl-C ends training early and keeps what it found.
    """
    from bayes_svdo.experiments import training

    settings = training.Settings(
        model=model,
        data=data,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        sigma_lr=sigma_lr,
        kl=kl,
        kl_warmup=kl_warmup,
        init_log_sigma2=init_log_sigma2,
        threshold=threshold,
        prune_while_training=prune_while_training,
        precision=precision,
        device=device,
        devices=devices,
        compile=compile,
        seed=seed,
        root=None if root is None else str(root),
    )
    place = Path("runs", f"{data}-{model}") if out is None else out
    done = training.run(settings, place, overwrite=overwrite, animation=animation)
    if done is not None:
        _report(done[0], place, done[1])


@app.command()
def show(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A folder that fit, demo or compare wrote.")
    ],
) -> None:
    """Show the table of a run, and draw its pictures again."""
    from bayes_svdo.experiments import compare, runs

    if compare.is_comparison(run):
        comparison = compare.load(run)
        _show(comparison.report(), run, lambda: compare.draw(comparison, run))
        return
    loaded = runs.load(run)
    _show(loaded.report(), run, lambda: runs.draw(loaded, run))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the run.")] = Path("demo"),
    seed: Annotated[
        int, typer.Option(help="Of initial weights, order of the data, and noise.")
    ] = 0,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", metavar=_FLAG, help="Replace any run in --out, not only an earlier demo."
        ),
    ] = False,
) -> None:
    """See a network prune itself: LeNet-300-100 on 8x8 digits, in a minute or two."""
    from bayes_svdo.experiments import demo as demonstration

    typer.echo("Training LeNet-300-100 on scikit-learn's digits: a minute or two.", err=True)
    run, pictures = demonstration.demo(out, seed, overwrite=overwrite)
    _report(run, out, pictures)


@app.command(
    epilog="Examples:\n\n"
    "  bayes-svdo compare\n\n"
    "  bayes-svdo compare digits digits+noise --seeds 10 --out compare\n\n"
    "  bayes-svdo compare mnist --seeds 1 --out compare-mnist"
)
def compare(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA]...",
            help="digits, digits+noise, mnist; the first two if not given.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Divisions of the data, and random states.")] = 10,
    out: Annotated[
        Path,
        typer.Option(help="Folder for the results; an unfinished comparison in it is continued."),
    ] = Path("compare"),
    root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of MNIST's files; else $BAYES_SVDO_DATA, the user's cache, or a download "
            "into it."
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", metavar=_FLAG, help="Start anew, and replace the comparison in --out."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
) -> None:
    """Rerun the poster's experiment: VD-ARD beside L1 and the RVM, accuracy and sparsity.

    Linear classifiers of digits, and of digits with 64 features of noise, halved at random per
    seed. The C of L1 is chosen by cross-validation in the training half. Ten seeds of both: some
    five minutes on one core. MNIST, only if named and without the RVM: some twelve per seed.
    Every result is written as it comes, and after Ctrl-C the same command continues.
    """
    from bayes_svdo.experiments import compare as comparing

    settings = comparing.Settings(
        data=tuple(data) if data else comparing.Settings.data,
        seeds=seeds,
        device=device,
        root=None if root is None else str(root),
    )
    comparison, pictures = comparing.run(settings, out, overwrite=overwrite, tell=_tell)
    _print(comparison.report())
    _list(out, pictures)
    if comparison.interrupted:
        _complain(
            f"interrupted after {len(comparison.results)} of {comparison.num_cells} results, which "
            f"are in {out}; the same command continues"
        )
        raise typer.Exit(_INTERRUPTED)


def _tell(row: dict[str, Any]) -> None:
    """A line for a result of a comparison."""
    typer.echo(
        f"{row['data']}, seed {row['seed']}, {row['method']}: accuracy {row['accuracy']:.1f} %, "
        f"zero weights {row['sparsity']:.1f} %, {row['seconds']:.1f} s",
        err=True,
    )


@app.command()
def figure(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="kl, gradient-variance, shrinkage, or all.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("figures"),
) -> None:
    """Draw an analytical figure, and write it as PNG with its numbers as CSV.

    kl: the KL and its approximations. gradient-variance: multiplicative against additive noise,
    measured in half a minute. shrinkage: VD-ARD beside the RVM and L1. all: these three.
    """
    from bayes_svdo.experiments import figures

    for path in figures.write(name, out):
        typer.echo(out / path.name)


def _show(
    report: Iterable[RenderableType], folder: Path, draw: Callable[[], Iterable[Path]]
) -> None:
    """Print a report, and draw its pictures if the folder can be written."""
    _print(report)
    try:
        pictures = draw()
    except OSError as error:
        _complain(f"the pictures were not drawn: {error}")
        return
    _list(folder, pictures)


def _report(run: Run, folder: Path, pictures: Iterable[Path]) -> None:
    """Print what a run found and where it is; exit with 130 if Ctrl-C has just ended it."""
    _print(run.report())
    _list(folder, pictures)
    if run.interrupted:
        _complain(f"training was {run.summary['stopped_because']}; the run so far is in {folder}")
        raise typer.Exit(_INTERRUPTED)


def _print(report: Iterable[RenderableType]) -> None:
    """Print a report."""
    console = Console()
    for part in report:
        console.print(part)


def _list(folder: Path, pictures: Iterable[Path]) -> None:
    """Print where it all is."""
    typer.echo(f"\nRun folder: {folder}")
    for picture in pictures:
        typer.echo(f"  {folder / picture.name}")


def _complain(message: str) -> None:
    """One line on stderr."""
    typer.echo("bayes-svdo: " + " ".join(message.split()), err=True)


def main() -> None:
    """The entry point."""
    app(prog_name="bayes-svdo")


if __name__ == "__main__":
    main()
