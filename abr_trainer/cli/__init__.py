"""The command `abr`: from a command line to work. One module for each verb; `main` finds it."""
