"""The command `abr`. It has one module per verb; `main` calls it."""
