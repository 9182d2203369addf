"""The main job: how small can a model get without getting worse?"""

import pathlib

import rich.console

from bmjax import config, report
from bmjax.jobs.compress import REPORT, Config, compress

PRESETS = pathlib.Path(__file__).parent / "configs" / "compress"


def main(settings: Config, workdir: pathlib.Path, command: str) -> None:
    """Runs the job and ends with its table, the verdict and the report's path."""
    results = compress(settings, workdir, command)
    console = rich.console.Console()
    console.print(report.table(results))
    console.print(f"report: {(workdir / REPORT).absolute()}", soft_wrap=True)


if __name__ == "__main__":
    config.launch(main, presets=PRESETS, default="digits", about=__doc__)
