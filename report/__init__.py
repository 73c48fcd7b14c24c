"""What people look at: analyses, figures, tables and the HTML page of a run."""
