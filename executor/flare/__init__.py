"""What can be imported below `fedloom.client`, as ``fedloom.client.tracking`` and the like.

`fedloom.client` is a module; its ``__path__`` is this folder. The modules here only pass on names, so that it does not
matter under which of their two names they are loaded.
"""
