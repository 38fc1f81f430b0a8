"""The one exception for what a user can fix."""

from tuner.system.console import one_line

FAULTS_SHOWN = 20


class UserError(Exception):
    """Something that the user can fix; the text names the place, the problem and the cure in one line.

    Names in it may be a stranger's: of control characters and line ends nothing is left.
    about: what a model hub refused ("token", "license" or "hub"), None if no hub did.
    faults: all mistakes in a file of rows, [(line, text), …]; the text shows the first FAULTS_SHOWN.
    """

    def __init__(self, text, about=None, faults=()):
        super().__init__(text if faults else one_line(text))
        self.about, self.faults = about, faults


def rows_error(path, faults):
    """Return the UserError for the mistakes in the file `path`, [(line, text), …]."""
    shown = [f"{one_line(str(path))}:{line}: {one_line(text)}" for line, text in faults[:FAULTS_SHOWN]]
    if len(faults) > FAULTS_SHOWN:
        shown.append(f"… and {len(faults) - FAULTS_SHOWN} more")
    return UserError("\n".join(shown), faults=faults)


def join_errors(errors):
    """Return one UserError for several, each in lines of its own."""
    if len(errors) == 1:
        return errors[0]
    faults = [fault for error in errors for fault in error.faults or [(None, str(error))]]
    return UserError("\n".join(dict.fromkeys(map(str, errors))), faults=faults)
