"""One kind of error for everything that a user can mend: one line, no traceback on the command line."""


class UserError(Exception):
    """Bad input. The message names the file or field, what was found, what is expected, and the remedy."""


def at_least_one(**sizes: int) -> None:
    """Raises UserError, which names it, for the first size below one."""
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name}: found {size}, expected at least 1.")
