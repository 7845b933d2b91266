"""What an engine has to do."""

from abc import ABC, abstractmethod


class Engine(ABC):
    """Takes tasks and gives chunks, step by step."""

    @abstractmethod
    def submit(self, task): ...

    @abstractmethod
    def step(self): ...
