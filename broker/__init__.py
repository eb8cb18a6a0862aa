"""Who talks to whom: sessions, the ledger of tasks, the journal, the spool, and `link`, a peer's side of the wire."""
