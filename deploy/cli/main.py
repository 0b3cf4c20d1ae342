"""The `sparkmoe` command."""

import logging
import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def main() -> None:
    app()


@app.callback()
def _root() -> None:
    """Serve one NVFP4 mixture-of-experts model across several small GPUs."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")


RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",  # unset, parts of a cluster disagree about it
    "RAY_memory_monitor_refresh_ms": "0",  # on unified memory it kills loading shards
    # The engine has a thread of its own, so a replica's event loop need not be kept free of our code, and what
    # replicas send each other need not become a Ray object: together a sixth more tokens/s at 16 streams.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
}
"""Environment variables that `serve` starts Ray with, unless they are set already.

Ray reads them when it is imported. Its documentation has them all.
"""


@app.command()
def serve(
    config: Annotated[Path, typer.Argument(help="A file of configs/.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="e.g. experts.shards=3; may be repeated."),
    ] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_ADDRESS", help="Ray cluster to join; `local` starts one here.")
    ] = "local",
) -> None:
    """Serve a config in the foreground until Ctrl-C; prints `ready URL` once a token can come out."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        from deploy.cli.launch import LaunchError, launch
        from deploy.config import load
    except KeyboardInterrupt:  # the imports take a second
        _fail("interrupted")

    try:
        checked, raw = load(config, set_ or [])
        launch(checked, raw, address=address)
    except (ValueError, LaunchError) as error:
        _fail(str(error))


@app.command()
def quantize(
    src: Annotated[Path, typer.Argument(help="Checkpoint directory with BF16 experts.")],
    dst: Annotated[Path, typer.Argument(help="Directory to write; must not exist, or be empty.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text to calibrate input scales on; the default is a sample that we ship."),
    ] = None,
) -> None:
    """Quantise a checkpoint's experts to NVFP4, in ModelOpt's layout."""
    from experts.checkpoint.quantize import quantize_checkpoint
    from router.calibrate import DEFAULT_TEXT, calibrate

    try:
        amax = calibrate(src, text or DEFAULT_TEXT, progress=True)
        quantize_checkpoint(src, dst, amax=amax, progress=True)
    except ValueError as error:
        _fail(str(error))
    typer.echo(f"wrote {dst}")


@app.command()
def status(
    url: Annotated[str, typer.Argument(help="URL of a running server.")] = "http://127.0.0.1:8000",
) -> None:
    """Tell whether a server is ready, and what its shards do."""
    from deploy.cli.readiness import LaunchError, readiness, status_lines

    try:
        ready, reason, detail = readiness(url if "://" in url else f"http://{url}")
    except LaunchError as error:
        _fail(str(error))
    for line in status_lines(ready, reason, detail):
        typer.echo(line)
    raise typer.Exit(0 if ready else 1)


@app.command()
def selftest() -> None:
    """Check that every kernel that this machine can run computes what it should, and measure how fast."""
    try:
        from experts.device import default_device
        from experts.selftest import selftest

        good = selftest(default_device(), echo=typer.echo)
    except KeyboardInterrupt:
        _fail("interrupted")
    raise typer.Exit(0 if good else 1)


def _fail(message: str) -> NoReturn:
    typer.echo(f"sparkmoe: {message}", err=True)
    raise typer.Exit(2)
