"""The server's side of algorithms, one file each."""
