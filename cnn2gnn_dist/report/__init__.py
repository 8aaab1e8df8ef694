"""`report.html` and its plots."""
