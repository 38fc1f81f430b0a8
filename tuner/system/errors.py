"""The one exception for what a user can fix."""


class RunError(Exception):
    """Something that the user can mend; its text is one line with the cure."""
