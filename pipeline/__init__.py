"""One run from its settings to its files: configuration, reuse of finished stages, evaluation, report, dry run."""
