"""A workflow: the server's side of an algorithm, as straight-line Python."""

from __future__ import annotations

from abc import ABC, abstractmethod

from .federation import Federation


class Workflow(ABC):
    """Decides what the sites do, round by round.

    ``run`` may be ended at any instant and is then run again from the top in another process: what it must remember
    goes through `Federation.commit`, and `Federation.rounds` starts at the first round that was not committed.
    """

    @abstractmethod
    def run(self, fed: Federation) -> None:
        """Do all rounds. Returning ends the workflow well; an error ends the job as failed, with its text."""
