"""Errors that a user can fix, each one sentence."""

from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The message names the field, what was given, what is allowed and the fix; `projects.run` prints it
    without a traceback and exits with `exit_code`.
    """

    exit_code = 2


def nearest(name: str, options) -> str:
    """`"Closest: x. "` when one of `options` looks like `name`, else an empty string."""
    close = get_close_matches(name, [str(option) for option in options], n=1, cutoff=0.5)
    return f"Closest: {close[0]}. " if close else ""


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError behind an exception, if there is one: Hydra wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None
