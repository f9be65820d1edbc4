"""`python -m peft_serve` is the command `peft-serve`."""

from peft_serve.cli import main

if __name__ == "__main__":
    main()
