"""Where the time of a simulation's rounds went: read from its processes, added up, and written down."""
