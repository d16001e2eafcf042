"""`python -m wanlora` and `accelerate launch -m wanlora`."""

from wanlora.cli import main

if __name__ == "__main__":
    main()
