"""``python -m loadtest``: see `loadtest.cli`."""

import os
import sys
import warnings

if __name__ == "__main__":
    # Bars and deprecations of the libraries that make models would run through the tables and bars shown here.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.simplefilter("ignore", FutureWarning)
    if sys.argv[1:2] == ["gpu-check"]:  # on a machine that has a GPU and little else
        from loadtest.gpu.command import main

        sys.exit(main(sys.argv[2:]))
    from loadtest.cli import main

    sys.exit(main(sys.argv[1:]))
