"""Callbacks by name."""


class Callback:
    """Observers of one kind of event."""

    def __init__(self):
        self.observers = []

    def on_next(self, observer):
        self.observers.append(observer)


class CallbackSystem:
    """Named callbacks that are told together."""

    def __init__(self):
        self.callbacks = {}

    def register(self, name):
        return self.callbacks.setdefault(name, Callback())

    def deregister(self, name):
        self.callbacks.pop(name, None)

    def trigger_all(self, *values):
        for callback in list(self.callbacks.values()):
            for observer in callback.observers:
                observer(*values)
