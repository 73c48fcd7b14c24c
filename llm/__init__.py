"""Language models behind a server: client, ledger, annotators, judges, search."""
