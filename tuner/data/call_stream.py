"""Split a text into what is said and what is called while it is still being written."""

from tuner.data import tool_call

SHORT = 512  # characters that are parsed at every piece; of more, parsing each time would be quadratic


class CallStream:
    """Take a text in pieces; give its parts, str or Call, once nothing that follows can change them.

    Pieces cut anywhere give the parts of the whole text (tool_call.split_text).
    """

    def __init__(self):
        self.held_back = ""  # what may become a call, or a longer one
        self.parsed_from = 0  # its length from which it is parsed again

    def add(self, text):
        """Return the parts that a further piece settles."""
        self.held_back += text
        if len(self.held_back) < self.parsed_from:
            return []
        parts, self.held_back = tool_call.split_text(self.held_back, more=True)
        self.parsed_from = len(self.held_back) + max(0, len(self.held_back) - SHORT) // 8
        return parts

    def finish(self):
        """Return the last parts, once the text has ended."""
        parts, self.held_back = tool_call.split_text(self.held_back)
        return parts
