"""A listener that keeps the notes it gets."""

from drllm.work.listener import Listener


class Notes(Listener):
    """Keeps its notes in `texts`."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)
