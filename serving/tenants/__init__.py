"""Who may ask for what, and what was used: keys, limits, the ledger, the audit log, traces."""
