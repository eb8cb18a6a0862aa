"""Fuzz targets: what each reads, what it may raise, and what must hold of whatever it accepts.

A target is a plain function of bytes that raises only when something is wrong: an error outside its allowed classes, a
promise that does not hold (AssertionError), or more memory than a multiple of the input. `run.py` beside this package
drives them with atheris; `test_fuzz.py` replays corpus and regressions in CI, with seeded mutations.
"""
