"""SQLite as a process knows it: what it has not committed is gone with it, and a disk may refuse."""

from __future__ import annotations

import sqlite3 as real_sqlite3
from typing import Any

import system


class Database:
    """A connection that its process may not outlive: what it has not committed is gone then."""

    def __init__(self, path: str, **options: Any) -> None:
        self._db = real_sqlite3.connect(path, **options)
        self._open = True
        self._fresh: list[Any] = []
        system.party().releases.append(lambda polite: self.close())

    @property
    def in_transaction(self) -> bool:
        return self._db.in_transaction

    def execute(self, statement: str, *args: Any) -> Any:
        if statement == "COMMIT":
            system.room.step()
            if system.disk.refuses():
                raise real_sqlite3.OperationalError("database or disk is full")
            done = self._db.execute(statement)
            system.disk.committed(self._fresh)
            self._fresh = []
            system.room.step()
            return done
        if statement.startswith("PRAGMA synchronous="):
            system.disk.synchronous = statement.partition("=")[2]
            statement = "PRAGMA synchronous=OFF"  # the room's disk forgets by itself, whatever the real one would
        elif statement == "PRAGMA journal_mode=WAL":
            statement = "PRAGMA journal_mode=MEMORY"
        elif statement == "ROLLBACK":
            self._fresh = []
        return self._db.execute(statement, *args)

    def executemany(self, statement: str, rows: Any) -> Any:
        rows = list(rows)
        if not rows:
            return None
        if statement.startswith(("INSERT OR REPLACE INTO results", "INSERT OR REPLACE INTO gathers")):
            self._fresh += [(statement.split()[4].partition("(")[0], row) for row in rows]
        return self._db.executemany(statement, rows)

    def close(self) -> None:
        if self._open:
            self._open = False
            self._db.close()


system.MODULES["sqlite3"] = system.Proxy(real_sqlite3, connect=Database)
