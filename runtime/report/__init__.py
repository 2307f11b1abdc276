"""What is said of recorded runs: statements, rows and charts, for the dashboard, the command line and report files."""
