"""One kind of error for everything that a user can mend: one line, no traceback on the command line."""


class UserError(Exception):
    """Bad input. The message names the file or field, what was found, what is expected, and the remedy."""
