"""`python -m abr_trainer`, and what launchers start: `torchrun -m abr_trainer train ...`."""

from .cli.main import main

if __name__ == "__main__":
    main()
