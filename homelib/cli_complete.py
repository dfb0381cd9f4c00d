"""What the shell offers when Tab is pressed: the names that a command knows. Read off folders and settings then and there, without PyTorch."""

from collections.abc import Callable
from pathlib import Path

from .paths import runs_dir, shipped

CONVENTIONS = ("own", "monai", "segmamba", "nnunet", "brats", "paper")  # `homelib.run.conventions` has them, but imports pandas
RUNS = ("*", "*/*", "*/*/*")  # below the folder of runs: runs/mine, runs/cv/fold-0, runs/ablations/GRID/RUN


def one_of(*names: str) -> Callable[[], list[str]]:
    return lambda: list(names)


def profiles() -> list[str]:
    from .config import PRESETS

    return list(PRESETS)


def data_sets() -> list[str]:
    return _stems(shipped("data_manifests"), "*.yaml")


def fetched() -> list[str]:
    return ["demo", *data_sets()]


def grids() -> list[str]:
    return _stems(shipped("notebooks") / "grids", "*.yaml")


def begun() -> list[str]:
    """Grids that have a folder."""
    return sorted(path.parent.name for path in (runs_dir() / "ablations").glob("*/plan.json"))


def notebooks() -> list[str]:
    return _stems(shipped("notebooks"), "[0-9][0-9]_*.ipynb")


def paper_tables() -> list[str]:
    return _stems(Path(__file__).parent / "study" / "paper", "T*.csv")


def runs() -> list[str]:
    return sorted(str(path.parent) for below in RUNS for path in runs_dir().glob(f"{below}/settings.json"))


def settings(incomplete: str) -> list[tuple[str, str]]:
    """Names for --set, `network=`, each with what it is; and behind the = the values of a setting that has a few."""
    from .config import Settings
    from .frozen import choices, leaves

    name, equals, _ = incomplete.partition("=")
    found = leaves(Settings)
    if not equals:
        return [(f"{one}=", field.description or "") for one, field in found.items()]
    return [(f"{name}={value}", "") for value in (choices(found[name]) if name in found else ())]


def _stems(folder: Path, pattern: str) -> list[str]:
    return sorted(path.stem for path in folder.glob(pattern))
