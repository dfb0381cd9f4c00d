"""The bar of a long action: how far it is, at what rate, and how long still; on a terminal alone."""

import sys
from collections.abc import Iterable

from tqdm import tqdm  # text, not a widget: an executed copy of a notebook keeps its last state


def bar(
    items: Iterable | None = None,
    *,
    desc: str = "",
    unit: str = "it",
    total: int | None = None,
    initial: int = 0,
    scaled: bool = False,
    keep: bool = True,
    show: bool = True,
) -> tqdm:
    """A bar on stderr, that counts `items` as they are taken or is updated by hand. Where stderr is no terminal nothing is shown, whatever `show` says.

    Args:
        desc: before the bar. unit: of what is counted.
        total: None is the number of items. initial: of those that were there before.
        scaled: large numbers as 1.2M.
        keep: the bar when it is full.
    """
    quiet = not (show and sys.stderr.isatty())
    return tqdm(items, desc=desc, unit=unit, total=total, initial=initial, unit_scale=scaled, leave=keep, disable=quiet, file=sys.stderr, dynamic_ncols=True)
