"""What stands behind cli.py: the help text, run folders, and the way from a command line to a job. No torch until a job starts."""
