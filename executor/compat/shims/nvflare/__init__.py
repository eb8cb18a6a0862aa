"""What ``import nvflare`` finds under ``--compat nvflare``; the names are in `fedloom.executor.compat.names`."""

from fedloom.executor.compat.finder import take_over

__getattr__, __all__ = take_over(__name__)
