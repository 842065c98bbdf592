"""`python -m packlight`, which is also how `torchrun -m` starts it."""

from packlight.cli import main

if __name__ == "__main__":
    main()
